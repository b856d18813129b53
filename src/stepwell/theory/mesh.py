"""Grids for the Fokker-Planck solver: where cells must be small, how far the domain must reach, how time is cut.

Kinks of the potential lie on faces. Between them a cell is at most a few layer widths wide, the distance eta rho E / (2 |drift|)
over which the density falls off beside a threshold; E comes from a cheap estimate of the learning curve. Beyond the grid and the
start, cells grow: nothing there but slow tails. Every refinement halves all cells and all steps, so that errors can be extrapolated.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stepwell.theory.cells import lattice
from stepwell.theory.closure import closure_state
from stepwell.theory.fokker_planck import Steps
from stepwell.theory.linear import linear_error, linear_state, rounded_error
from stepwell.theory.problem import Problem
from stepwell.theory.scheme import HALF_STEPS
from stepwell.theory.staircase import Array, Staircase

PER_STEP = 8  # coarse cells per spacing at least,
AFFORDABLE = 16.0  # where more layers than this are asked for, cells grow with them
FINEST = 1000.0  # unless a spacing is as small as this part of the range: averages over cells do then
FAR = 1e3  # ranges that a stationary law reaches at most
ENOUGH = 512  # levels that an estimate needs at most
GROWTH = 0.1
CALM = 0.01  # no grid starts finer than for this part of the largest E: the noise may die out altogether
QUIET = 1e-3  # nor than for this times the squared spacing, which E leaves at once where training starts near a perfect student
MOST_CELLS, MOST_STEPS, MOST_LEVELS = 2e5, 2e5, 1e6  # of any grid: beyond, cells and steps grow, and two grids decide whether they may
FIRST, FASTER, LONGEST = 0.01, 0.02, 0.1  # step lengths times eta: at first, per elapsed time, at most
SIGMAS, TAIL = 6.5, 25.0  # reach of a Gaussian in standard deviations, of an exponential in lengths: both below 1e-10


class Scales(NamedTuple):
    """An estimate of what the solver will meet."""

    early: float
    """typical E while the weights travel"""
    least: float
    most: float


def scales(problem: Problem, weights: Staircase, horizon: float) -> Scales:
    """Return an estimate of E along the curve: from the closure, for LOTION from unquantized training."""
    t = np.concatenate([[0.0], np.geomspace(min(0.1, horizon / 10) / problem.lr, max(horizon, 1e-6), 60)]) if horizon > 0 else np.zeros(1)
    t = np.unique(t[t <= horizon])
    if problem.method == "lotion":
        error = linear_error(problem, linear_state(problem, t))
    else:
        simple = _simple(weights)
        error = rounded_error(problem, simple, closure_state(replace(problem, weights=simple), t)[0])
    E = np.maximum(2 * error + problem.label_noise**2, max(QUIET * float(np.max(weights.steps)) ** 2, 1e-12))
    most = float(np.max(E))
    return Scales(float(np.sqrt(E[0] * max(np.min(E), 0.1 * E[0]))), max(0.8 * float(np.min(E)), CALM * most), 1.5 * most)


def mesh(problem: Problem, weights: Staircase, horizon: float, scale: Scales, *, layers: float, finest: float = 0.0) -> Array:
    """Return cell boundaries, `(cells + 1,)`, with cells of at most so many `layers`, but not aiming below `finest`."""
    rho, steps = problem.power, weights.steps
    farthest = np.sqrt(problem.teacher_power) * (1.0 if problem.teacher == "one" else 4.5)
    spread = abs(problem.initial_overlap) / problem.teacher_power * farthest + SIGMAS * np.sqrt(problem.initial_variance)
    layer = problem.lr * scale.least / (2 * float(np.max(steps)))
    width = np.sqrt(problem.initial_variance + 0.1 * problem.lr * rho * scale.early) / 2
    step = float(np.max(steps)) / PER_STEP * max(1.0, layers / AFFORDABLE)
    inner = min(layers * layer, width, max(step, weights.range / FINEST))
    reach = _reach(problem, weights, horizon, scale, farthest, spread)
    extent = 2 * reach if problem.method == "lotion" else float(np.ptp(weights.thresholds)) + 2 * spread
    inner = max(inner, finest, extent / MOST_CELLS)
    pull = abs(problem.gain * farthest) + rho * float(np.max(np.abs(weights.levels)))
    outer = max(inner, min(layers * problem.lr * rho * scale.early / pull, width, 0.2))
    center = _center(problem, inner)
    if problem.method == "lotion":
        if reach > MOST_LEVELS * float(np.min(weights.steps)):
            raise ValueError(
                f"`weights` has a spacing of {float(np.min(weights.steps)):.3g} where LOTION's weights reach {reach:.3g}: "
                f"more than {MOST_LEVELS:.0g} cells of the lattice. Use fewer bits or a larger range."
            )
        levels = lattice(weights, reach)
        return _fill(_between(np.union1d(levels, (levels[1:] + levels[:-1]) / 2), center), inner)
    kinks = weights.thresholds
    if problem.method == "clipped_ste":
        c = problem.clip_range
        return _fill(np.concatenate([[-c], kinks[np.abs(kinks) < c * (1 - 1e-12)], [c]]), min(inner, c / PER_STEP))
    left = kinks[0] - _outwards(inner, outer, max(reach + kinks[0], 4 * inner), max(spread + kinks[0], 0.0))[::-1]
    right = kinks[-1] + _outwards(inner, outer, max(reach - kinks[-1], 4 * inner), max(spread - kinks[-1], 0.0))
    return np.concatenate([left, _fill(_between(kinks, center), inner), right])


def halved(edges: Array) -> Array:
    """Return the edges with every cell cut in two."""
    return np.insert(edges, np.arange(1, len(edges)), (edges[1:] + edges[:-1]) / 2)


def cut(times: Array, lr: float, level: int) -> Steps:
    """Return the time grid, cut in two `level` times: short steps first, every output on a step."""
    marks: list[float] = [0.0]
    longest = max(LONGEST, float(times[-1]) * lr / MOST_STEPS)
    for t in times * lr:
        while marks[-1] < t - 1e-12 * t:
            wish = min(FIRST + FASTER * marks[-1], longest)
            count = int(np.ceil((t - marks[-1]) / wish - 1e-9))
            marks.append(t if count <= 1 else marks[-1] + (t - marks[-1]) / count)
    length = np.repeat(np.diff(marks), 2**level) / 2**level
    output = np.searchsorted(marks, times * lr * (1 - 1e-12)) * 2**level
    starting = HALF_STEPS // 2  # the first steps are done as twice as many implicit half steps
    if len(length) >= starting:
        length = np.concatenate([np.repeat(length[:starting] / 2, 2), length[starting:]])
        output = output + np.minimum(output, starting)
    return Steps(length, output)


def _simple(weights: Staircase) -> Staircase:
    """Return a hard staircase with fewer levels over the same range, good enough for an estimate."""
    if len(weights.levels) <= ENOUGH:
        return replace(weights, temperature=0.0)
    keep = np.linspace(0, len(weights.levels) - 1, ENOUGH).astype(int)
    return Staircase(weights.bits, weights.range, "levels", values=tuple(weights.levels[keep].tolist()))


def _reach(problem: Problem, weights: Staircase, horizon: float, scale: Scales, farthest: float, spread: float) -> float:
    """Return how far weights get within the horizon."""
    a, rho, lam = problem.gain, problem.power, problem.weight_decay
    D, duration = problem.lr * rho * scale.most / 2, problem.lr * horizon
    if problem.method == "lotion":
        noise = SIGMAS * np.sqrt(problem.initial_variance + min(2 * D * duration, D / rho))
        return float(max(spread, a / rho * farthest + noise) + (1 + problem.strength) * float(np.max(weights.steps)))
    nearest = farthest if problem.teacher == "one" else -farthest
    outward = max(a * farthest - rho * weights.levels[-1], rho * weights.levels[0] - a * nearest)
    edge = float(np.max(np.abs(weights.thresholds)))
    noise = SIGMAS * np.sqrt(min(2 * D * duration, D / lam if lam > 0 else np.inf))
    if outward < 0:
        reach = max(spread + 1e-9, edge + min(TAIL * D / -outward, noise))
    else:
        reach = max(spread, edge) + min(outward * duration, outward / lam if lam > 0 else np.inf) + noise
    # beyond the outermost threshold nothing depends on the place any more, so what has run that far may stop there
    return float(reach if np.isfinite(horizon) else min(reach, max(spread, FAR * edge, FAR * weights.range)))


def _center(problem: Problem, inner: float) -> Array:
    """Return where a start narrower than a cell lies: on a face its mean is right to second order, inside a cell only to first."""
    narrow = problem.teacher == "one" and problem.initial_variance < inner**2
    return np.full(int(narrow), problem.initial_overlap / np.sqrt(problem.teacher_power))


def _between(points: Array, more: Array) -> Array:
    return np.union1d(points, more[(more > points[0]) & (more < points[-1])])


def _fill(points: Array, most: float) -> Array:
    """Return the points with every gap cut into equal cells of at most `most`; gaps far below it are merged."""
    kept = [0]
    for k in range(1, len(points)):
        if k == len(points) - 1 or points[k + 1] - points[kept[-1]] > most:
            kept.append(k)
    points = points[kept]
    counts = np.maximum(1, np.ceil(np.diff(points) / most - 1e-9)).astype(int)
    parts = [points[k] + np.diff(points)[k] * np.arange(n) / n for k, n in enumerate(counts)]
    return np.concatenate([*parts, points[-1:]])


def _outwards(inner: float, outer: float, reach: float, start: float) -> Array:
    """Return growing distances up to `reach`; within `start` no cell is larger than `outer`."""
    marks, size = [0.0], inner
    while marks[-1] < reach:
        size = size * (1 + GROWTH)
        if marks[-1] < start:
            size = min(size, outer)
        marks.append(marks[-1] + size)
    return np.array(marks[1:])
