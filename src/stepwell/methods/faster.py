"""Faster: latent weights that learn at a multiple of the learning rate that the rest of the network has.

Source: none. A rounded forward pass must move a weight by a whole cell before anything changes, parameters in float must not; one learning
rate for both is a compromise, the worse the fewer the bits. Where every step is in proportion to the learning rate, weight decay included,
as Adam's and SGD's are, this is a parameter group of its own with that much more of it; unlike one it needs no change to the optimizer.
A step that a method takes itself after the optimizer's (CAGE's pull, a penalty that no moment takes) is as much longer.
"""

import math

from stepwell.methods.base import Method


def faster(method: Method, multiplier: float) -> Method:
    """Return a method whose latent weights take steps that many times as long as the optimizer makes them.

    Args:
        method: any method with a rounded forward pass, and so with latent weights.
        multiplier: positive; 1.5 to 2 serves most runs at four bits and fewer, and 1 is the method itself.

    Raises:
        TypeError: `method` is no Method.
        ValueError: a multiplier that is not positive and finite; a method that trains on the weights themselves.
    """
    if not isinstance(method, Method):
        raise TypeError(f"`method` must be a method such as `ste(int4())`: got {type(method).__name__} {method!r}.")
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not (math.isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"`multiplier` must be positive and finite: got {multiplier!r}. 1.5 to 2 serves most runs.")
    if method.deploy is None:
        raise ValueError(
            f"`method`: {method.name} trains on the weights themselves, where a longer step is a larger learning rate. Set that instead."
        )
    return method._replace(name=f"{method.name}, rate x {multiplier:g}", rate_multiplier=method.rate_multiplier * multiplier)
