"""RTN: every selected weight is rounded to the nearest grid value, without data."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from stepwell.ptq.chosen import chosen
from stepwell.quantizers import Encoded, Quantizer


def rtn(model: nn.Module, quantizer: Quantizer | Mapping[str, Quantizer | None], *, skip: Sequence[str] = ()) -> dict[str, Encoded]:
    """Round a model's weights to the nearest grid values, in place, and return them encoded.

    Everything is checked and encoded before the first weight is written: an error leaves the model as it was. A weight that several
    modules share is rounded once, under its first name. Parameters narrower than float32 receive the grid values rounded to their dtype;
    the returned codes and scales are those of the grid.

    Args:
        model: any module; its parameters are written, nothing else.
        quantizer: one grid for every selected weight, or a mapping from names or patterns to grids, in which the first match wins and None
            leaves the weight alone. Where a layer stores its contraction dimension elsewhere than last and the grid has `axis=None`, the
            layer's own axis is used.
        skip: names or patterns of parameters or modules to leave alone.

    Returns:
        Encoded weights by parameter name, in the model's order. `encoded[name].decode()` equals the float32 parameter bit for bit.

    Raises:
        TypeError: something that is no `Quantizer` where one belongs.
        ValueError: nothing selected, a name that matches nothing, a weight that is not finite, a block that does not divide.

    >>> from stepwell.formats import integer
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 0.2]])
    >>> encoded = rtn(layer, Quantizer(integer(2)))
    >>> layer.weight.data, encoded["weight"].codes
    (tensor([[1., 0.]]), tensor([[1, 0]], dtype=torch.int8))
    """
    weights = chosen(model, quantizer, skip=skip)
    encoded = {name: grid.encode(parameter) for name, parameter, grid in weights}
    with torch.no_grad():
        for name, parameter, _ in weights:
            parameter.copy_(encoded[name].decode())
    return encoded
