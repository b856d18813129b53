"""Plan: which weights go to which grid, and why the others stay in float."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from stepwell.blocks import block_length
from stepwell.quantizers import Quantizer
from stepwell.selection import select

Grids = dict[str, Quantizer | None]


@dataclass(frozen=True)
class Plan:
    """What becomes of every parameter of a model.

    Attributes:
        grids: parameter name -> its grid, in the model's order.
        floats: parameter name -> why it stays in float; only those that have two dimensions or more, or were skipped.
        elements: numbers in the quantized parameters.
        total: numbers in all parameters.
    """

    grids: dict[str, Quantizer]
    floats: dict[str, str]
    elements: int
    total: int

    @property
    def choices(self) -> Grids:
        """What `ptq` and `attach` take: these weights and no other."""
        return {**self.grids, "*": None}


def plan(
    model: nn.Module, quantizer: Quantizer | Mapping[str, Quantizer], *, skip: Sequence[str] = (), matrices: bool = False, target: str = ""
) -> Plan:
    """Decide what becomes of every parameter.

    A weight that the block does not divide stays in float, and so does one that the target has no operator for.

    Args:
        model: any module; it may be without memory ("meta").
        quantizer: the grid, or the grid of every weight by name, as `bits_per_layer` returns it; what it does not name stays in float.
        skip: names or patterns to leave in float.
        matrices: whether only weights of two dimensions can be quantized.
        target: named in reasons.

    Raises:
        ValueError: nothing is left to quantize; says why of the first weights.
    """
    grids: dict[str, Quantizer] = {}
    floats: dict[str, str] = {}
    rows = select(model, quantizer if isinstance(quantizer, Quantizer) else {**quantizer, "*": None}, skip=skip)
    for row in rows:
        if row.choice is None:
            if row.parameter.ndim > 1:
                floats[row.name] = row.reason
            continue
        grid = row.choice if row.choice.axis is not None else replace(row.choice, axis=row.axis)
        if matrices and row.parameter.ndim != 2:
            floats[row.name] = f"{row.parameter.ndim} dimensions: {target} holds matrices"
            continue
        try:
            block_length(tuple(row.parameter.shape), grid.block, grid.axis)
        except ValueError:
            floats[row.name] = f"blocks of {grid.block} do not divide its shape {'x'.join(map(str, row.parameter.shape))}"
            continue
        grids[row.name] = grid
    if not grids:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(floats.items())[:3])
        raise ValueError(f"`model`: no weight is left to quantize ({why or 'it has no matrix'}).")
    sizes = {row.name: row.parameter.numel() for row in rows}
    return Plan(grids, floats, sum(sizes[name] for name in grids), sum(sizes.values()))
