"""Allocation: one grid per layer, from what each layer alone costs on each; an integer program, solved exactly.

Symbols: x_lg = 1 where layer l is on grid g, one g per l; d_lg = increase of the loss, b_lg = bits. Increases of layers add up here, which
is not what a network does: the joint loss of a solution must be measured.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from stepwell.blocks import scale_shape
from stepwell.quantizers import Quantizer
from stepwell.scales import TORCH_DTYPES

Array = NDArray[np.float64]
Picks = tuple[int, ...]  # the grid of every layer, by its place in a list


def stored_bits(grid: Quantizer, shape: tuple[int, ...]) -> float:
    """Return how many bits one weight of this shape takes: its code, and its share of scales and zero points.

    >>> from stepwell.presets import int4
    >>> stored_bits(int4(block=32), (8, 64))
    5.0
    """
    scales = math.prod(scale_shape(shape, grid.block, grid.axis))
    widths = {"e8m0": 8, "e4m3": 8}
    width = widths.get(grid.scale_dtype) or TORCH_DTYPES[grid.scale_dtype].itemsize * 8
    zero = 0 if grid.format.levels != "affine" else width if grid.zero == "minimum" else 8
    return grid.format.bits + (width + zero) * scales / math.prod(shape)


def fewest_bits(increases: Array, bits: Array, aim: float) -> Picks | None:
    """Return the grid of every layer with the fewest bits in all whose increases add up to at most an aim; None where there is none.

    Args:
        increases: `(layers, grids)`, 0 or more; infinite where a grid is out of the question.
        bits: `(layers, grids)`, of a whole layer.
        aim: above 0.

    >>> fewest_bits(np.array([[0.3, 0.1], [0.05, 0.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]), 0.2)
    (1, 0)
    """
    return _solved(bits, increases, aim)


def least_increase(increases: Array, bits: Array, budget: float) -> Picks | None:
    """Return the grid of every layer with the smallest sum of increases whose bits add up to at most a budget; None where there is none.

    >>> least_increase(np.array([[0.3, 0.1], [0.05, 0.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]), 6.0)
    (1, 0)
    """
    return _solved(increases, bits, budget)


def total(table: Array, picks: Picks) -> float:
    """Return the sum over layers of a table's values at the picked grids."""
    return float(sum(row[pick] for row, pick in zip(table, picks, strict=True)))


def _solved(objective: Array, limited: Array, limit: float) -> Picks | None:
    """Minimise one sum under a limit on the other; both are scaled, because the solver's tolerances are absolute."""
    layers, grids = objective.shape
    barred = ~(np.isfinite(objective) & np.isfinite(limited))
    cost, row = (np.where(barred, 0.0, table).ravel() for table in (objective, limited))
    one_each = np.kron(np.eye(layers), np.ones(grids))
    found = milp(
        cost / (np.abs(cost).max() or 1.0),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(row[None] / limit, ub=1)],
        integrality=np.ones(layers * grids),
        bounds=Bounds(0, np.where(barred.ravel(), 0, 1)),
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else tuple(int(pick) for pick in found.x.reshape(layers, grids).argmax(axis=1))
