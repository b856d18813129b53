"""STE: the forward pass sees rounded weights, the optimizer moves the latent ones with the gradient it finds there.

Source: Bengio, Leonard, Courville, "Estimating or propagating gradients through stochastic neurons" (arXiv:1308.3432); clipped variant:
Courbariaux et al. (arXiv:1602.02830). Differs: the rounding is paid once per optimizer step, not once per forward pass.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from stepwell.methods.base import Context, Method, round_nearest
from stepwell.quantizers import Quantizer


def ste(quantizer: Quantizer, *, clip: float | None = None) -> Method:
    """Return straight-through training on a grid.

    Args:
        quantizer: the grid.
        clip: None passes every gradient; a positive number passes it only where the latent weight lies within `clip` times the grid's
            range (clipped STE). Latent weights are never projected.

    Raises:
        TypeError: `quantizer` is no Quantizer.
        ValueError: `clip` is not positive and finite.
    """
    check_quantizer(quantizer)
    if clip is None:
        return Method(quantizer, "ste", deploy=round_nearest)
    if not (isinstance(clip, int | float) and math.isfinite(clip) and clip > 0):
        raise ValueError(f"`clip` must be a positive number of grid ranges, or None: got {clip!r}.")

    return Method(quantizer, "clipped ste", deploy=round_nearest, gradient=Clipped(float(clip)))


@dataclass(frozen=True)
class Clipped:
    """Passes the gradient where the latent weight lies within `clip` times the grid's range; a record, so that a kernel can do the same."""

    clip: float

    def __call__(self, gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> Tensor:
        """Return the gradient, zero elsewhere."""
        del deployed
        units = context.fitted(weight).to_units(weight)
        low, high = context.quantizer.format.low * self.clip, context.quantizer.format.high * self.clip
        return gradient * ((units >= low) & (units <= high))


def check_quantizer(quantizer: object) -> None:
    """Raise where a method is given something else than a Quantizer."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"`quantizer` must be a Quantizer such as `int4(block=32)`: got {type(quantizer).__name__} {quantizer!r}.")
