"""Stationary states: where training ends.

Exact limit: the law of a weight is Gibbs, p(w | w*) ~ exp(-U(w) / D) with D = eta rho E / 2 and U of `landscape`; E must be the error
that this law has, one scalar equation. For hard STE without decay p is exponential between thresholds and E[psi | w*] is the target
a w* / rho, clipped to the levels. Closure: the fixed point of its two equations.
Where weights run away there is no stationary law of the latent weight, yet the error converges: psi sticks at the outermost level.
"""

from collections.abc import Callable
from dataclasses import replace
from math import pi, sqrt
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from stepwell.theory.closure import RUNAWAY, runs_away
from stepwell.theory.fokker_planck import Landscape, log_sinhc
from stepwell.theory.gaussian import moments
from stepwell.theory.landscape import Nodes, build, teacher_nodes
from stepwell.theory.linear import linear_stationary, ptq_stationary
from stepwell.theory.mesh import FAR, Scales, halved, mesh
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import Array, Staircase
from stepwell.theory.trajectory import Stationary

SCAN = 121
CALM = {"one": 2e-3, "gauss": 1e-2}  # grids resolve layers down to this part of the largest E; below, nothing moves any more
NODES = 360
DIVERGED = "The learning rate is beyond the linear threshold, which LOTION shares: the latent weights grow without bound."


def stationary(problem: Problem, *, limit: Literal["exact", "closure"] = "exact") -> Stationary:
    """Return the state after infinitely many steps.

    Args:
        problem: any method but clipped STE.
        limit: "exact" or "closure"; they agree for PTQ and without a weight quantizer.

    Returns:
        The error and a status: "runaway" where latent weights leave the grid for good (the error is the limit), "diverged".

    Raises:
        ValueError: clipped STE, whose end depends on its path; LOTION in the closure.

    >>> p = Problem(weights=Staircase(bits=3, range=1.5), lr=0.1, label_noise=0.3)
    >>> round(stationary(p).error, 5), round(stationary(p, limit="closure").error, 5)
    (0.01287, 0.01276)
    """
    if limit not in ("exact", "closure"):
        raise ValueError(f"`limit` must be 'exact' or 'closure': got {limit!r}.")
    if problem.weights is None or problem.method == "ptq":
        return ptq_stationary(problem)
    if problem.method == "clipped_ste":
        raise ValueError("`problem` must not have method 'clipped_ste': frozen weights remember their path. Use `exact` with a late time.")
    if problem.method == "lotion":
        if limit == "closure":
            raise ValueError("`limit` must be 'exact' for method 'lotion': got 'closure', and its law does not close.")
        if linear_stationary(problem)[1] != "ok":
            return Stationary(np.inf, "diverged", DIVERGED, error_latent=np.inf, error_randomized=np.inf)
        return _gibbs(problem, problem.weights)
    if runs_away(problem) and (limit == "closure" or problem.teacher == "one"):
        return Stationary(_saturated(problem, problem.weights), "runaway", RUNAWAY)
    return _closure(problem, problem.weights) if limit == "closure" else _gibbs(problem, problem.weights)


def _saturated(problem: Problem, weights: Staircase) -> float:
    """Return the error with every weight on an outermost level, on the teacher's side."""
    a, rho, R, low, high = problem.gain, problem.power, problem.teacher_power, weights.levels[0], weights.levels[-1]
    if problem.teacher == "one":
        level = high if problem.target * sqrt(R) >= high * (1 - 1e-12) else low
        return float((R - 2 * a * sqrt(R) * level + rho * level**2) / 2)
    return float((R - a * (high - low) * sqrt(2 * R / pi) + rho * (high**2 + low**2) / 2) / 2)


def _gibbs(problem: Problem, weights: Staircase) -> Stationary:
    """Solve the scalar equation for E on a grid; where the grid is not exact, on two fine grids, extrapolated."""
    if problem.method == "ste" and problem.weight_decay == 0 and weights.temperature == 0:
        nodes = teacher_nodes(problem, min(NODES, max(20, 4_000_000 // len(weights.levels))))
        far = FAR * weights.range  # the law beyond the outermost threshold is exponential, so one cell is exact
        errors, _, roots = _self_consistent(problem, weights, nodes, np.concatenate([[-far], weights.thresholds, [far]]))
    else:
        nodes = teacher_nodes(problem, NODES // 4)
        _, root, _ = _self_consistent(problem, weights, nodes, _grid(problem, weights, 0.03 * _largest(problem, weights), layers=4.0))
        _, root, roots = _self_consistent(problem, weights, nodes, _grid(problem, weights, np.exp(root), layers=4.0))
        edges = _grid(problem, weights, np.exp(root), layers=0.5 if problem.teacher == "one" else 2.0)
        first, root, _ = _self_consistent(problem, weights, nodes, edges, near=root)
        second, root, _ = _self_consistent(problem, weights, nodes, halved(edges), near=root)
        errors = np.maximum((4 * second - first) / 3, 0.0)
    message = f"{roots} self-consistent states; this is the one with the largest noise." if roots > 1 else ""
    if problem.method == "lotion":
        return Stationary(float(errors[0]), "ok", message, error_latent=float(errors[1]), error_randomized=float(errors[2]))
    return Stationary(float(errors[0]), "ok", message)


def _grid(problem: Problem, weights: Staircase, energy: float, *, layers: float) -> Array:
    """Return the solver's own grid for a start at the target and this E."""
    start = problem.target * problem.teacher_power if problem.teacher == "one" else 0.0
    energy = max(energy, CALM[problem.teacher] * _largest(problem, weights))
    calm = replace(problem, initial_overlap=start, initial_variance=weights.range**2 / 4)
    return mesh(calm, weights, np.inf, Scales(energy, energy, 2 * energy), layers=layers)


def _self_consistent(
    problem: Problem, weights: Staircase, nodes: Nodes, edges: Array, *, near: float | None = None
) -> tuple[Array, float, int]:
    """Return the errors of the law that has the E it was made with, log E, and the number of such laws (1 if searched `near`)."""
    landscape, observables = build(problem, weights, nodes, edges)

    def excess(logarithm: float) -> float:
        energy = np.exp(logarithm)
        return float((landscape.energy_offset + np.sum(landscape.energy * _law(landscape, energy)) - energy) / energy)

    if near is not None and excess(near - 0.3) > 0 > excess(near + 0.3):
        root, roots = float(brentq(excess, near - 0.3, near + 0.3, xtol=1e-10)), 1
    else:
        most = np.log(_largest(problem, weights))
        root, roots = _scan(excess, most - 30.0, most)
    masses = _law(landscape, float(np.exp(root)))
    errors = observables.offset + np.einsum("enc,nc->e", observables.functional, masses)
    return np.maximum(errors, 0.0), root, roots


def _law(landscape: Landscape, energy: float) -> Array:
    """Return the Gibbs masses at this E, `(nodes, cells + 2)`; exact where the potential is linear in each cell."""
    D = landscape.diffusion * energy
    logits = log_sinhc(landscape.force * landscape.width / (2 * D)) + np.log(landscape.width) - landscape.potential[:, 1:-1] / D
    masses = np.zeros_like(landscape.potential)
    masses[:, 1:-1] = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(masses / masses.sum(axis=1, keepdims=True))


def _largest(problem: Problem, weights: Staircase) -> float:
    """Return a bound on E: by the levels, for LOTION by unquantized training plus a step of the lattice."""
    R, reach = problem.teacher_power, float(np.max(np.abs(weights.levels)))
    if problem.method == "lotion":
        state = linear_stationary(problem)[0]
        step = (1 + problem.strength) * float(np.max(weights.steps))
        slack = problem.power * (float(state.v) + step**2) / max(2 - problem.lr * problem.power, 1e-3)
        return float(R + problem.label_noise**2 + 4 * slack)
    return R + problem.label_noise**2 + 2 * problem.gain * sqrt(R) * reach + problem.power * reach**2


def _scan(excess: Callable[[float], float], least: float, most: float) -> tuple[float, int]:
    """Return the largest root of a function that is positive below it, and the number of sign changes."""
    grid = np.linspace(least, most, SCAN)
    values = np.array([excess(x) for x in grid])
    crossings = np.nonzero((values[:-1] > 0) & (values[1:] <= 0))[0]
    if len(crossings) == 0:
        return (float(grid[0]) if values[-1] <= 0 else float(grid[-1])), 0
    k = crossings[-1]
    return float(brentq(excess, grid[k], grid[k + 1], xtol=1e-12)), len(crossings)


def _closure(problem: Problem, weights: Staircase) -> Stationary:
    """Solve dm/dt = 0 for each spread s, then dv/dt = 0 for s."""
    a, rho, eta, lam, R = problem.gain, problem.power, problem.lr, problem.weight_decay, problem.teacher_power

    def state(s: float) -> tuple[float, float]:
        """Return dv/dt and the error at the fixed point of m for this spread (of w for a Gaussian teacher)."""
        if problem.teacher == "one":
            pull = lambda mu: a * sqrt(R) - rho * float(moments(weights, mu, s).mean) - lam * mu  # noqa: E731
            far = weights.range + 40 * s + (a * sqrt(R) / lam if lam > 0 else 0.0)
            mu = float(brentq(pull, -far, far, xtol=1e-14))
            g = moments(weights, mu, s)
            overlap, variance = sqrt(R) * float(g.mean), s * s
        else:
            g = moments(weights, 0.0, s)
            m = a * R / (rho * float(g.slope) + lam)
            overlap, variance = m * float(g.slope), s * s - m * m / R
        error = (R - 2 * a * overlap + rho * float(g.square)) / 2
        noise = eta * rho * (2 * error + problem.label_noise**2)
        return noise - 2 * (rho * float(g.slope) + lam) * variance, error

    spread = weights.range * 1e-7, max(weights.range, sqrt(R) * problem.target) * 1e3 * (1 + eta)
    root, roots = _scan(lambda x: state(float(np.exp(x)))[0], float(np.log(spread[0])), float(np.log(spread[1])))
    message = f"{roots} fixed points; this is the one with the largest spread." if roots > 1 else ""
    return Stationary(state(float(np.exp(root)))[1], "ok", message)
