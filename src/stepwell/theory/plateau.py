"""Plateaus: how long a learning curve stays flat, measured, and why, estimated.

Measured: L10 is the first time a tenth of the whole drop is done, L90 nine tenths; the plateau length is L10, sharpness (L90 - L10) / L10.
Estimated for STE (symbols as in `problem`, mu = eta a sqrt(R) t the mean of w):
- dead zone: weights start inside the cell of level 0, nothing happens until they cross its edge, Delta / (2 eta a sqrt(R));
- in-cell: weights sit together in a cell of level l below the target, for (width of the cell) / (eta (a sqrt(R) - rho l));
- saturation: the start is wider than the grid, psi = +-top sign(w), and only the signs turn; without overlap
  erf(mu / sqrt(2 v0)) = 1/10 at L10.
Clipping, and decay or temperature that are not small, are not covered: mechanism "none", with the reason.
"""

from math import erf, pi, sqrt
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfinv, ndtr

from stepwell.theory.closure import closure
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import Array, Staircase
from stepwell.theory.trajectory import Plateau, Trajectory

Mechanism = Literal["dead zone", "in-cell", "saturation", "none"]

FLAT, MOVES = 0.05, 0.2
SATURATED = 0.5  # more than half of the weights beyond the outermost thresholds
NARROW = 0.25  # start narrower than this part of a cell
SMALL = 0.05  # part of the drift, or of a width, below which decay and temperature are left out
FALLS = "the error falls from the start"


class Estimate(NamedTuple):
    """What one mechanism says about a plateau."""

    mechanism: Mechanism
    scale: float
    """its time scale: the deterministic crossing time, the time in the cell, or 1 / (eta a sqrt(R)) for saturation"""
    height: float
    """error on the plateau"""
    l10: float
    """estimated plateau length, in t"""
    reason: str = ""
    """why there is no estimate, for mechanism "none" only"""


def plateau(trajectory: Trajectory) -> Plateau:
    """Measure the plateau of a learning curve over its whole window, `[0, last time]`, with linear interpolation.

    Args:
        trajectory: a curve, best on at least 400 times beginning at 0.

    Returns:
        Lengths in t. Without a drop (the error never falls below its start) L10 and L90 are infinite.
    """
    l10, l90, drop = lengths(trajectory.t, trajectory.error)
    if drop == 0:
        return Plateau(l10, l90, np.inf, drop, None)
    return Plateau(l10, l90, (l90 - l10) / l10 if l10 > 0 else np.inf, drop, _flat(trajectory.t, trajectory.error, l10))


def lengths(t: Array, error: Array) -> tuple[float, float, float]:
    """Return L10, L90 and the whole drop of a curve."""
    drop = float(error[0] - np.min(error))
    if not drop > 1e-12 * max(1.0, abs(float(error[0]))) or not np.isfinite(drop):
        return np.inf, np.inf, 0.0
    return _first_below(t, error, float(error[0]) - 0.1 * drop), _first_below(t, error, float(error[0]) - 0.9 * drop), drop


def estimate(problem: Problem, horizon: float) -> Estimate:
    """Name the mechanism that makes the first plateau and estimate its length.

    Args:
        problem: STE with quantized weights; other methods have no such plateau.
        horizon: the window in t whose smallest error sets the whole drop.

    Returns:
        The estimate; mechanism "none" with length 0 and the reason where the error falls from the start or nothing is known.
    """
    weights = problem.weights
    none = Estimate("none", 0.0, float("nan") if weights is None else _height(problem, 0.0), 0.0, FALLS)
    if weights is None:
        return none
    if problem.method != "ste":
        return none._replace(reason=f"no estimate covers method {problem.method!r}")
    spread, place = sqrt(problem.initial_variance), problem.initial_overlap / sqrt(problem.teacher_power)
    level, edges = _cell(weights, place)
    width = _width(weights, edges)
    if problem.teacher == "one" and spread <= NARROW * width:
        found = _gathered(problem, weights, level, edges, horizon)
        farthest, pull = max(abs(place), abs(edges[1])), problem.gain * sqrt(problem.teacher_power) - problem.power * level
    else:
        beyond = 0.0
        if spread > 0:
            beyond = float(ndtr((weights.thresholds[0] - place) / spread) + ndtr((place - weights.thresholds[-1]) / spread))
        found = _saturation(problem, weights, spread, place) if beyond >= SATURATED and weights.symmetric else none
        farthest, pull, width = spread + abs(place), problem.gain * sqrt(problem.teacher_power), spread
    if found.mechanism != "none" and problem.weight_decay * farthest > SMALL * pull:
        return none._replace(reason=f"no estimate covers weight decay {problem.weight_decay:g}")
    if found.mechanism != "none" and weights.temperature > SMALL * width:
        return none._replace(reason=f"no estimate covers temperature {weights.temperature:g}")
    return found


def _gathered(problem: Problem, weights: Staircase, level: float, edges: tuple[float, float], horizon: float) -> Estimate:
    """Return the dead zone if the cell's level is zero, else the in-cell plateau; none if the target lies in this cell."""
    a, rho, root = problem.gain, problem.power, sqrt(problem.teacher_power)
    place, height = problem.initial_overlap / root, _height(problem, level)
    speed = problem.lr * (a * root - rho * level - problem.weight_decay * place)
    if speed <= 0 or not np.isfinite(edges[1]):
        return Estimate("none", 0.0, height, 0.0, "the mean weight starts in the cell that it does not leave")
    if abs(level) > 1e-12:
        crossing = (edges[1] - max(place, edges[0])) / speed
        return Estimate("in-cell", crossing, height, crossing)
    distance, step = edges[1] - place, weights.steps[np.searchsorted(weights.thresholds, edges[1])]
    window = closure(problem, np.linspace(0.0, horizon, 401)).error
    gain = (2 * a * root * step - rho * step**2) / 2  # by which the next level lowers the error
    share = 0.1 * float(window[0] - np.min(window)) / gain if gain > 0 else np.inf
    scale = distance / speed
    diffusion = problem.lr**2 * rho * (problem.teacher_power + problem.label_noise**2)
    if not 0 < share < 1:
        return Estimate("dead zone", scale, height, scale)

    def crossed(t: float) -> float:
        return float(ndtr((speed * t - distance) / sqrt(problem.initial_variance + diffusion * t)) - share)

    early = 1e-9 * scale
    return Estimate("dead zone", scale, height, float(brentq(crossed, early, 1e3 * scale)) if crossed(early) < 0 else 0.0)


def _saturation(problem: Problem, weights: Staircase, spread: float, place: float) -> Estimate:
    """Only signs turn: solve for a tenth of the rest of the rise of E[w* sign w], from where the start has it."""
    root, x0 = sqrt(problem.teacher_power), place / spread
    speed, top = problem.lr * problem.gain * root, float(weights.levels[-1])
    if problem.teacher == "one":
        begin = erf(x0 / sqrt(2))
        x1, full = sqrt(2) * float(erfinv(begin + 0.1 * (1 - begin))), root
    else:  # E[w* sign w] rises as x / sqrt(1 + x^2)
        begin = x0 / sqrt(1 + x0**2)
        share = begin + 0.1 * (1 - begin)
        x1, full = share / sqrt(1 - share**2), root * sqrt(2 / pi)
    height = (problem.teacher_power - 2 * problem.gain * top * full * begin + problem.power * top**2) / 2
    return Estimate("saturation", 1 / speed, height, (x1 - x0) * spread / speed)


def _height(problem: Problem, level: float) -> float:
    root = sqrt(problem.teacher_power)
    overlap = root * level if problem.teacher == "one" else 0.0
    return (problem.teacher_power - 2 * problem.gain * overlap + problem.power * level**2) / 2


def _cell(weights: Staircase, place: float) -> tuple[float, tuple[float, float]]:
    """Return level and ends of the cell of `place`; a threshold belongs to the cell above, into which the drift carries it."""
    k = int(np.searchsorted(weights.thresholds, place, side="right"))
    low = float(weights.thresholds[k - 1]) if k > 0 else -np.inf
    high = float(weights.thresholds[k]) if k < len(weights.thresholds) else np.inf
    return float(weights.levels[k]), (low, high)


def _width(weights: Staircase, edges: tuple[float, float]) -> float:
    """Return the width of a cell; of an outermost one, which has no end, the step that bounds it."""
    if np.isfinite(edges[0]) and np.isfinite(edges[1]):
        return edges[1] - edges[0]
    return float(weights.steps[-1] if np.isinf(edges[1]) else weights.steps[0])


def _first_below(t: Array, error: Array, level: float) -> float:
    """Return the first time at which the error, linear between the times, reaches the level."""
    k = int(np.argmax(error <= level))
    if k == 0:
        return float(t[0])
    part = (error[k - 1] - level) / (error[k - 1] - error[k])
    return float(t[k - 1] + part * (t[k] - t[k - 1]))


def _flat(t: Array, error: Array, after: float) -> tuple[float, float] | None:
    """Return the longest window after the first drop that is flat and followed by a move."""
    full = float(np.ptp(error))
    best: tuple[float, float] | None = None
    first = int(np.searchsorted(t, after))
    last = first
    for k in range(first, len(t)):
        last = max(last, k)
        while last + 1 < len(t) and np.ptp(error[k : last + 2]) < FLAT * full:
            last += 1
        later = error[last + 1 :]
        moved = len(later) > 0 and float(np.max(np.abs(later - error[last]))) > MOVES * full
        if moved and last > k and (best is None or t[last] - t[k] > best[1] - best[0]):
            best = (float(t[k]), float(t[last]))
    return best
