"""Fused passes of the soft staircase: what smoothing adds to a grid value is looked up in a table that is made once per temperature.

An error function per threshold and weight would take longer than all the rest of a step. A table of 2048 nodes, read between two nodes, is
within 3e-7 of a grid step: the curvature of Phi(x / T) is at most .242 / T^2, nodes are min(.5, 6 T) / 2047 apart, and an error is a
curvature times the distance squared over 8.
"""

from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from stepwell.formats import Format
from stepwell.methods.soft import HOTTEST, NEAR, SIGMAS, lift_even

NODES = 2048
KINDS = 2 * NEAR + 1  # of grid values: three or more neighbours on either side, or how many fewer on one


class Smoothing(NamedTuple):
    """A table of `2 * kinds + 1` rows of `nodes`, one after the other, and its nodes per grid step: inside the grid, and outside it."""

    table: Any
    inner: float
    outer: float


@cache
def kernels() -> ModuleType | None:
    """Return the compiled kernel; None where numba is absent, or has no folder to keep it in."""
    try:
        from stepwell.run import kernels_soft
    except (ImportError, RuntimeError):
        return None
    return kernels_soft


@lru_cache(maxsize=16)
def smoothing(format: Format, temperature: float) -> Smoothing:
    """Return the table of a grid of equal steps at a temperature above 0, from the eager function itself in float64."""
    hot = min(temperature, HOTTEST)
    inner, outer = np.linspace(0, min(0.5, SIGMAS * hot), NODES), np.linspace(0, SIGMAS * hot, NODES)
    table = np.zeros((2 * KINDS + 1, NODES))
    for target in format.values:
        kind = NEAR + round(min(target - format.low, NEAR) - min(format.high - target, NEAR))
        if not table[2 * kind].any():
            table[2 * kind], table[2 * kind + 1] = (_lift(target, side * (0.5 - inner), format, hot) for side in (-1, 1))
    table[-1] = -_lift(format.high, 0.5 + outer, format, hot)
    table[-1, -1] = 0  # too far from any threshold
    if inner[-1] < 0.5:
        table[:, -1] = 0
    return Smoothing(table.astype(np.float32).reshape(-1), (NODES - 1) / inner[-1], (NODES - 1) / outer[-1])


def _lift(target: float, rest: Any, format: Format, temperature: float) -> Any:
    """Return what smoothing adds to a grid value, for weights at these distances from it."""
    at = torch.full((len(rest),), float(target), dtype=torch.float64)
    return lift_even(at + torch.from_numpy(rest), at, format, torch.tensor(temperature, dtype=torch.float64), NEAR).numpy()
