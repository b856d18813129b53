"""Sweeps: plateau length and final error over bit widths and ranges, and the range that is best for a given horizon."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from stepwell.theory.closure import closure
from stepwell.theory.exact import exact
from stepwell.theory.plateau import lengths
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import MAX_BITS, MIN_BITS, Array, Staircase
from stepwell.theory.trajectory import Trajectory

Theory = Literal["exact", "closure"]

TIMES = 401
GRID = {"closure": 385, "exact": 49}  # the error has narrow valleys where a level passes the target; the closure is cheap
VALLEYS, ZOOMS = 6, 3


@dataclass(frozen=True, eq=False)
class Sweep:
    """A phase diagram, one row per bit width and one column per range.

    Attributes:
        bits: bit widths, `(widths,)`.
        ranges: ranges, `(ranges,)`.
        l10: plateau lengths in t, `(widths, ranges)`; infinite where the error never falls.
        l90: times of nine tenths of the drop, same shape.
        error: error at the horizon, same shape.
        status: status of each solve, same shape.
    """

    bits: tuple[int, ...]
    ranges: Array
    l10: Array
    l90: Array
    error: Array
    status: tuple[tuple[str, ...], ...]

    def best(self) -> Array:
        """Return the range with the smallest final error for each bit width, `(widths,)`."""
        return np.asarray(self.ranges[np.argmin(self.error, axis=1)])


@dataclass(frozen=True, eq=False)
class BestRange:
    """The range to use for a horizon.

    Attributes:
        range: the best range found.
        error: its error at the horizon.
        ranges: all ranges tried, sorted, `(ranges,)`.
        errors: their errors at the horizon, `(ranges,)`.
        on_edge: whether `range` is the smallest or largest one tried, so that a better one may lie outside.
    """

    range: float
    error: float
    ranges: Array
    errors: Array
    on_edge: bool = False

    def __float__(self) -> float:
        return self.range


def best_range(problem: Problem, horizon: float, *, theory: Theory = "closure", ranges: ArrayLike | None = None) -> BestRange:
    """Return the weight range with the smallest error after `horizon`.

    Args:
        problem: constants; the range of `weights` is what is searched, its kind and bits stay. Inputs stay as they are.
        horizon: time t = steps / dimension at which training ends.
        theory: "closure" (fast) or "exact".
        ranges: where to look, increasing; by default 0.1 to 8 times the target's scale. The search then zooms
            into the six deepest valleys.

    Returns:
        The best range, its error, and everything tried.

    Raises:
        ValueError: no weight quantizer, one with listed levels, a horizon that is not positive, no ranges, or an unknown theory.
    """
    _check(problem, horizon, theory)
    scale = problem.target * np.sqrt(problem.teacher_power)
    tried = np.geomspace(0.1, 8.0, GRID[theory]) * scale if ranges is None else _ranges(ranges)
    found: dict[float, float] = {}
    for _ in range(1 + ZOOMS):
        for omega in tried:
            if omega not in found:
                found[float(omega)] = _final(_with_range(problem, float(omega)), horizon, theory)
        done = np.array(sorted(found))
        errors = np.nan_to_num([found[omega] for omega in done], nan=np.inf, posinf=np.inf)  # a failed solve is no valley
        tried = np.concatenate([np.linspace(done[max(k - 1, 0)], done[min(k + 1, len(done) - 1)], 9) for k in _valleys(errors)])
    k = int(np.argmin(errors))
    return BestRange(float(done[k]), float(errors[k]), done, errors, k in (0, len(done) - 1))


def sweep(problem: Problem, horizon: float, *, bits: Sequence[int], ranges: ArrayLike, theory: Theory = "closure") -> Sweep:
    """Return plateau lengths and final errors over bit widths and ranges.

    Args:
        problem: constants; bits and range of `weights` are replaced. Inputs stay as they are.
        horizon: last time; plateaus are measured on 401 times up to it, finer at the beginning.
        bits: bit widths.
        ranges: ranges, `(ranges,)`.
        theory: "closure" (a millisecond each) or "exact".

    Raises:
        ValueError: as `best_range`, or `bits` that are empty or not whole numbers from 1 to 16.
    """
    _check(problem, horizon, theory)
    omegas, widths = _ranges(ranges), _widths(bits)
    times = np.concatenate([[0.0], np.geomspace(horizon * 1e-3, horizon, TIMES - 1)])
    curves = [[_curve(_with_range(problem, float(omega), width), times, theory) for omega in omegas] for width in widths]
    measured = np.array([[lengths(times, curve.error)[:2] for curve in row] for row in curves])
    final = np.array([[curve.error[-1] for curve in row] for row in curves])
    status = tuple(tuple(curve.status for curve in row) for row in curves)
    return Sweep(widths, omegas, measured[..., 0], measured[..., 1], final, status)


def _valleys(errors: Array) -> Array:
    """Return the places of the deepest local minima, deepest first."""
    walled = np.concatenate([[np.inf], errors, [np.inf]])
    low = np.flatnonzero((errors <= walled[:-2]) & (errors <= walled[2:]))
    return np.asarray(low[np.argsort(errors[low], kind="stable")][:VALLEYS])


def _with_range(problem: Problem, omega: float, bits: int | None = None) -> Problem:
    weights = problem.weights
    assert weights is not None
    return replace(problem, weights=Staircase(bits or weights.bits, omega, weights.kind, weights.temperature))


def _curve(problem: Problem, times: Array, theory: Theory) -> Trajectory:
    return closure(problem, times) if theory == "closure" else exact(problem, times)


def _final(problem: Problem, horizon: float, theory: Theory) -> float:
    return float(_curve(problem, np.array([horizon]), theory).error[-1])


def _widths(bits: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(bits)
    whole = all(isinstance(width, int | np.integer) and not isinstance(width, bool) and MIN_BITS <= width <= MAX_BITS for width in widths)
    if not widths or not whole:
        raise ValueError(f"`bits` must be one or more whole numbers from {MIN_BITS} to {MAX_BITS}: got {list(bits)!r}.")
    return tuple(int(width) for width in widths)


def _ranges(ranges: ArrayLike) -> Array:
    omegas = np.atleast_1d(np.asarray(ranges, dtype=float))
    if omegas.ndim != 1 or omegas.size == 0:
        raise ValueError(f"`ranges` must be a one-dimensional, non-empty array: got shape {omegas.shape}.")
    return omegas


def _check(problem: Problem, horizon: float, theory: Theory) -> None:
    if problem.weights is None or problem.weights.kind == "levels":
        raise ValueError(f"`problem` must have weights of kind 'end', 'mid' or 'tread', whose range can vary: got {problem.weights!r}.")
    if isinstance(horizon, bool) or not isinstance(horizon, int | float | np.floating | np.integer):
        raise TypeError(f"`horizon` must be a number, the time at which training ends: got {horizon!r}.")
    if not np.isfinite(horizon) or horizon <= 0:
        raise ValueError(f"`horizon` must be a finite time above 0: got {horizon!r}.")
    if theory not in ("exact", "closure"):
        raise ValueError(f"`theory` must be 'exact' or 'closure': got {theory!r}.")
