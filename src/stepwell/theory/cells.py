"""Averages over cells: what a finite-volume grid needs to know about a staircase.

Everything comes from antiderivatives, so a cell may hold any number of thresholds. LOTION's lattice is the staircase's own
levels, continued beyond both ends with the outermost step.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from stepwell.theory.staircase import Array, Staircase

NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)
VALUES = 2e7


class Cells(NamedTuple):
    """Averages over each cell, all `(cells,)`, and the cell geometry."""

    edges: Array
    """cell boundaries, `(cells + 1,)`"""
    center: Array
    width: Array
    psi: Array
    """average of psi"""
    psi_squared: Array
    """average of psi^2"""


def cells(staircase: Staircase, edges: Array) -> Cells:
    """Return the averages of psi and psi^2 over the cells between `edges`."""
    width = np.diff(edges)
    center = (edges[1:] + edges[:-1]) / 2
    psi = np.diff(integral(staircase, edges)) / width
    if staircase.temperature == 0:
        squared = np.diff(_piecewise(staircase.levels**2, staircase.thresholds, edges)) / width
    else:
        squared = _mean_square(staircase, edges)
    return Cells(edges, center, width, psi, squared)


def _mean_square(staircase: Staircase, edges: Array) -> Array:
    """Return the cell averages of psi_T^2: Gauss-Legendre on pieces no longer than T, as far as memory goes."""
    width = np.diff(edges)
    affordable = max(1, int(VALUES / (len(width) * len(NODES) * len(staircase.thresholds))))
    pieces = min(int(np.ceil(np.max(width) / staircase.temperature)), affordable)
    offsets = ((np.arange(pieces)[:, None] + 0.5 * (1 + NODES)) / pieces).ravel()
    values = staircase(edges[:-1, None] + width[:, None] * offsets)
    return np.asarray(values**2 @ np.tile(WEIGHTS, pieces) / (2 * pieces))


def integral(staircase: Staircase, w: Array) -> Array:
    """Return an antiderivative of psi_T at `w`, continuous and of the same shape."""
    if staircase.temperature == 0:
        return _piecewise(staircase.levels, staircase.thresholds, w)
    T = staircase.temperature
    z = (w[..., None] - staircase.thresholds) / T
    ramps = T * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
    return np.asarray(staircase.levels[0] * w + ramps @ staircase.steps)


def lattice(staircase: Staircase, reach: float) -> Array:
    """Return the levels, continued with the outermost steps until they cover `[-reach, reach]`."""
    levels, steps = staircase.levels, staircase.steps
    below = max(0, int(np.ceil((reach + levels[0]) / steps[0])) + 1)
    above = max(0, int(np.ceil((reach - levels[-1]) / steps[-1])) + 1)
    low = levels[0] - steps[0] * np.arange(below, 0, -1)
    high = levels[-1] + steps[-1] * np.arange(1, above + 1)
    return np.concatenate([low, levels, high])


def rounding_variance(levels: Array, w: Array) -> Array:
    """Return (w - lower)(upper - w) on a lattice that covers `w`, elementwise."""
    k = np.clip(np.searchsorted(levels, w), 1, len(levels) - 1)
    return np.asarray((w - levels[k - 1]) * (levels[k] - w))


def rounding_variance_integral(levels: Array, w: Array) -> Array:
    """Return an antiderivative of the rounding variance, continuous: one cell of length L adds L^3 / 6."""
    steps = np.diff(levels)
    whole = np.concatenate([[0.0], np.cumsum(steps**3 / 6)])
    k = np.clip(np.searchsorted(levels, w), 1, len(levels) - 1) - 1
    x = w - levels[k]
    return np.asarray(whole[k] + steps[k] * x**2 / 2 - x**3 / 3)


def _piecewise(values: Array, thresholds: Array, w: Array) -> Array:
    """Return an antiderivative of the function that has `values[k]` between the thresholds k - 1 and k."""
    offsets = np.concatenate([[0.0], np.cumsum(np.diff(values) * thresholds)])
    k = np.searchsorted(thresholds, w)
    return np.asarray(values[k] * w - offsets[k])
