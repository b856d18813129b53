"""The exact limit of infinite dimension: one Fokker-Planck equation per teacher value, coupled by the error.

dw = eta (a w* - rho psi(w) - lam w) dt + eta sqrt(rho E(t)) dB,   E(t) = 2 eps_g(t) + sigma^2,
independently for each weight given its teacher, with E from the law itself. The law does not stay Gaussian as soon as weights are
quantized: that is what `closure` neglects. Solved on two nested grids with twice the cells, steps and teacher nodes, and extrapolated;
their distance decides whether the grid is fine enough.
Source: the limit of arXiv:2510.10693 without its Gaussian assumption; clipped STE has absorbing ends, LOTION another drift.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stepwell.theory.cells import cells
from stepwell.theory.closure import RUNAWAY, runs_away
from stepwell.theory.fokker_planck import evolve
from stepwell.theory.landscape import Nodes, build, start, teacher_nodes
from stepwell.theory.linear import State, linear_error, linear_state, ptq, rounded_error, unquantized
from stepwell.theory.mesh import cut, halved, mesh, scales
from stepwell.theory.problem import Problem, check_times
from stepwell.theory.scheme import HALF_STEPS
from stepwell.theory.staircase import Array, Staircase
from stepwell.theory.trajectory import Density, Status, Trajectory

TEACHER_NODES = 45  # of the coarse grid
LAYERS = 2.0  # width of the coarse cells in layers at a threshold
LOTION_LAYERS = {"one": 4.0, "gauss": 16.0}  # kinks everywhere, so no part of the grid is coarse
TOLERANCE = 6e-3  # largest distance of two grids; the extrapolated curve is more than ten times closer
WORK = 3e8  # cells times steps that a solve may take
COARSEST = 100.0  # layers; beyond, every cell grows
START = 1e-3  # largest deviation of the error at t = 0 from its closed form
DENSITY_VALUES = 5e7
EXPLODED = 1e3


class Solution(NamedTuple):
    """One solve on one grid."""

    errors: Array
    """`(errors, times)`: rounded, and for LOTION latent and randomized"""
    energy: Array
    """E after every step, `(steps + 1,)`"""
    edges: Array
    nodes: Nodes
    masses: Array
    """`(times, nodes, cells + 2)` where they are kept"""
    first: float
    """rounded error at t = 0"""


def exact(problem: Problem, times: ArrayLike, *, density: bool = False) -> Trajectory:
    """Return the learning curve in the limit of infinite dimension.

    Args:
        problem: constants, any method.
        times: strictly increasing, >= 0, `(times,)`; t = step / dimension.
        density: also return the law of the weights given the teacher at each time, on the finest grid.

    Returns:
        The curve; for LOTION also `.error_latent` and `.error_randomized`. Status "runaway" where weights leave the grid for good,
        "diverged" where LOTION's latent weights grow without bound, "stiff" where the finest affordable grid was not enough.

    Raises:
        ValueError: bad times; clipped STE with weight decay, whose sticky ends have no closed equation; a density too large;
            LOTION on more lattice cells than memory holds.

    >>> p = Problem(weights=Staircase(bits=1, range=1.5), lr=0.2)
    >>> float(exact(p, [400.0]).error[0].round(4))   # one bit: (R - R + omega^2 - 1) / 2
    0.625
    """
    t = check_times(times)
    if problem.weights is None:
        return unquantized(problem, t)
    if problem.method == "ptq":
        return ptq(problem, t)
    if problem.method == "clipped_ste" and problem.weight_decay > 0:
        raise ValueError(
            f"`weight_decay` must be 0 for the exact limit of clipped STE: got {problem.weight_decay:g}. "
            "The ends of the clip range become sticky and no closed equation is known. Use `simulate`."
        )
    bounded = _bounded(problem, t)
    solutions, converged = _refine(problem, problem.weights, bounded, density)
    fine, coarse = solutions
    errors = np.full((len(fine.errors), len(t)), np.inf)
    errors[:, : len(bounded)] = np.maximum((4 * fine.errors - coarse.errors) / 3, 0.0)
    status, message = _verdict(problem, len(bounded) < len(t), converged)
    first = (4 * fine.first - coarse.first) / 3
    if status in ("ok", "runaway") and abs(first - _at_start(problem, problem.weights)) > START * max(1.0, first):
        status, message = "stiff", "The error at t = 0 misses its closed form: the start is narrower than the grid or the teacher's nodes."
    law = _density(fine) if density else None
    if problem.method == "lotion":
        return Trajectory(t, errors[0], status, message, error_latent=errors[1], error_randomized=errors[2], density=law)
    return Trajectory(t, errors[0], status, message, density=law)


def solve(problem: Problem, weights: Staircase, times: Array, edges: Array, level: int, *, keep: bool = False) -> Solution:
    """Return the solution on one grid: `edges` halved and steps cut `level` times, the teacher nodes doubled as often.

    This is `exact` without refinement and extrapolation: second order in cells and steps.
    """
    for _ in range(level):
        edges = halved(edges)
    nodes = teacher_nodes(problem, TEACHER_NODES * 2 ** min(level, 1))
    landscape, observables = build(problem, weights, nodes, edges)
    masses = start(problem, nodes, edges)
    if problem.method == "clipped_ste":
        frozen = _frozen(problem, weights, nodes, edges)
        landscape = landscape._replace(energy_offset=landscape.energy_offset + 2 * frozen)
        observables = observables._replace(offset=observables.offset + frozen)
    else:
        masses[:, 1] += masses[:, 0]
        masses[:, -2] += masses[:, -1]
        masses[:, [0, -1]] = 0.0
    first = observables.offset + float(np.sum(observables.functional[0] * masses))
    path = evolve(landscape, masses, cut(times, problem.lr, level), functionals=observables.functional, keep=keep)
    return Solution(observables.offset + path.observed, path.energy, edges, nodes, path.masses, first)


def _refine(problem: Problem, weights: Staircase, times: Array, density: bool) -> tuple[tuple[Solution, Solution], bool]:
    """Return the two finest solutions and whether they are close."""
    horizon = float(times[-1])
    scale = scales(problem, weights, horizon)
    nodes = len(teacher_nodes(problem, 2 * TEACHER_NODES).mass)
    layers = LOTION_LAYERS[problem.teacher] if problem.method == "lotion" else LAYERS
    steps = len(cut(times, problem.lr, 0).length)
    finest = 0.0
    while True:  # a start that is too fine to refine even once is made coarser: the comparison of two grids still judges it
        edges = mesh(problem, weights, horizon, scale, layers=layers, finest=finest)
        work = float(len(edges) * steps * nodes)
        if 16 * work <= WORK or (layers > COARSEST and 4 * work <= WORK) or finest > weights.range:
            break
        layers, finest = (2 * layers, 0.0) if layers <= COARSEST else (layers, 2 * max(finest, float(np.min(np.diff(edges)))))
    if density:
        _check_density(2 * len(times) * len(edges) * nodes)
    coarse = solve(problem, weights, times, edges, 0, keep=density)
    fine = solve(problem, weights, times, edges, 1, keep=density)
    level = 1
    while not _close(fine, coarse):
        level += 1
        if len(edges) * 4.0**level * steps * nodes > WORK:
            return (fine, coarse), False
        if density:
            _check_density(2**level * len(times) * len(edges) * nodes)
        coarse, fine = fine, solve(problem, weights, times, edges, level, keep=density)
    return (fine, coarse), True


def _close(fine: Solution, coarse: Solution) -> bool:
    """Whether two grids agree, at the outputs and at all common steps after the implicit ones."""
    distance = float(np.max(np.abs(fine.errors - coarse.errors)))
    if len(coarse.energy) > HALF_STEPS:
        theirs = coarse.energy[HALF_STEPS:]
        ours = fine.energy[2 * HALF_STEPS - 2 :: 2][: len(theirs)]
        distance = max(distance, float(np.max(np.abs(ours - theirs))) / 2)
    return distance <= TOLERANCE * max(1.0, float(np.max(coarse.errors[0])))


def _at_start(problem: Problem, weights: Staircase) -> float:
    """Return the closed form of the rounded error at t = 0."""
    state = State(np.array([problem.initial_overlap]), np.array([problem.initial_variance]))
    return float(rounded_error(problem, weights, state)[0])


def _frozen(problem: Problem, weights: Staircase, nodes: Nodes, edges: Array) -> float:
    """Return what weights that start beyond the clip range add to the error, beyond what an atom at the end adds."""
    c = float(edges[-1])
    far = (
        c
        + 9 * max(np.sqrt(problem.initial_variance), 1e-6 * c)  # never empty, also for a start without width
        + abs(problem.initial_overlap / problem.teacher_power) * float(np.max(np.abs(nodes.value)))
    )
    total = 0.0
    for side in (-1, 1):
        inside = weights.thresholds[(weights.thresholds * side > c) & (weights.thresholds * side < far)]
        outside = np.unique(np.concatenate([side * np.linspace(c, far, 2 if weights.temperature == 0 else 2000), inside]))
        masses = start(problem, nodes, outside)[:, 1:-1]
        masses[:, -1 if side > 0 else 0] += start(problem, nodes, outside)[:, -1 if side > 0 else 0]
        average = cells(weights, outside)
        end = float(weights(side * c))
        value, square = average.psi - end, average.psi_squared - end**2
        overlap = problem.gain * nodes.value[:, None] * value
        total += float(np.sum(nodes.mass[:, None] * masses * (problem.power * square / 2 - overlap)))
    return total


def _bounded(problem: Problem, times: Array) -> Array:
    """Return the times before LOTION's latent weights explode, at least one."""
    if problem.method != "lotion" or problem.lr * problem.power < 2:
        return times
    error = linear_error(problem, linear_state(problem, times))
    return times[: max(1, int(np.sum(error < EXPLODED)))]


def _verdict(problem: Problem, exploded: bool, converged: bool) -> tuple[Status, str]:
    if problem.method == "lotion" and problem.lr * problem.power >= 2:
        return "diverged", "The learning rate is beyond the linear threshold, which LOTION shares: the latent weights grow without bound."
    if not converged or exploded:
        return "stiff", f"Two grids still differ by more than {TOLERANCE:g}: layers at the thresholds are thinner than the finest grid."
    if problem.method == "ste" and problem.teacher == "one" and runs_away(problem):
        return "runaway", RUNAWAY
    return "ok", ""


def _check_density(values: int) -> None:
    if values > DENSITY_VALUES:
        raise ValueError(f"`density` would need {values:.3g} numbers, at most {DENSITY_VALUES:.3g}: ask for fewer `times`.")


def _density(solution: Solution) -> Density:
    width = np.diff(solution.edges)
    p = solution.masses[:, :, 1:-1] / width
    edges = np.tile(solution.edges, (len(solution.nodes.mass), 1))
    return Density(edges, p, solution.nodes.value, solution.nodes.mass, solution.masses[:, :, [0, -1]])
