"""Chosen: which weights of a model are rounded to which grid, checked before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from stepwell.blocks import block_length
from stepwell.quantizers import Quantizer, check_weight
from stepwell.selection import select


class Chosen(NamedTuple):
    """A parameter and its grid, which runs along the parameter's own contraction dimension."""

    name: str
    parameter: nn.Parameter
    quantizer: Quantizer


def chosen(model: nn.Module, quantizer: Quantizer | Mapping[str, Quantizer | None], *, skip: Sequence[str] = ()) -> list[Chosen]:
    """Return the weights that a call rounds, in the model's order.

    Args:
        model: any module.
        quantizer: one grid, or a mapping from names or patterns to grids, in which the first match wins and None leaves a weight alone.
        skip: names or patterns of parameters or modules to leave alone.

    Raises:
        TypeError: something that is no `Quantizer` where one belongs.
        ValueError: nothing selected, a name that matches nothing, a weight that is not finite, a block that does not divide.
    """
    for grid in quantizer.values() if isinstance(quantizer, Mapping) else [quantizer]:
        if not (isinstance(grid, Quantizer) or (grid is None and isinstance(quantizer, Mapping))):
            raise TypeError(f"`quantizer` must be a Quantizer or a mapping from names to Quantizers or None: got {grid!r}. Try `int4()`.")
    found = []
    for row in select(model, quantizer, skip=skip).chosen:
        assert row.choice is not None
        grid = row.choice if row.choice.axis is not None else replace(row.choice, axis=row.axis)
        check_weight(row.parameter, row.name)
        try:
            block_length(tuple(row.parameter.shape), grid.block, grid.axis)
        except ValueError as error:
            raise ValueError(f"parameter {row.name!r}: {error}") from error
        found.append(Chosen(row.name, row.parameter, grid))
    if not found:
        raise ValueError("nothing is selected for rounding. Print `stepwell.select(model)`: it says why each parameter was left out.")
    return found
