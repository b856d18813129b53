"""Stationary states: where training ends.

Exact limit: the law of a weight is Gibbs, p(w | w*) ~ exp(-U(w) / D) with D = eta rho E / 2 and U of `landscape`; E must be the error
that this law has, one scalar equation. For hard STE without decay p is exponential between thresholds and beyond them, so that no
grid is needed, and E[psi | w*] is the target a w* / rho, clipped to the levels. Closure: the fixed point of its two equations.
Where weights run away there is no stationary law of the latent weight, yet the error converges: psi sticks at the outermost level.
"""

from collections.abc import Callable
from dataclasses import replace
from math import pi, sqrt
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq

from stepwell.theory.closure import RUNAWAY, runs_away
from stepwell.theory.deviation import bracket
from stepwell.theory.fokker_planck import Landscape, log_sinhc
from stepwell.theory.gaussian import moments
from stepwell.theory.landscape import Nodes, build, teacher_nodes
from stepwell.theory.linear import linear_stationary, ptq_stationary
from stepwell.theory.mesh import Scales, halved, mesh
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import Array, Staircase
from stepwell.theory.trajectory import Stationary, Status

SCAN = 121
CALM = {"one": 2e-3, "gauss": 1e-2}  # grids resolve layers down to this part of the largest E; below, nothing moves any more
NODES = 360
BUDGET = {"one": 250_000, "gauss": 30_000}  # cells times `layers` at most: some 100 MB and up to half a minute
SETTLED = 1e-5  # two grids that agree to this part have resolved what matters, wide cells or not
DEEPEST = 30.0  # log of how far below its largest value E is searched
DIVERGED = "The learning rate is beyond the linear threshold, which LOTION shares: the latent weights grow without bound."
UNRESOLVED = "At this learning rate and noise the law is narrower than the finest affordable grid: a layer was not resolved."
WELLS = "Beyond strength 1 every lattice point may hold a weight: a run may stay far from this law for a very long time."
LOST = "No self-consistent noise was found in the range that was searched: this is the value at its end, not the limit."


class Root(NamedTuple):
    """Where a scan ended."""

    root: float
    roots: int
    bracketed: bool

    def verdict(self, several: str) -> tuple[Status, str]:
        """Return the status, and the sentence that goes with it."""
        if not self.bracketed:
            return "not converged", LOST
        return "ok", f"{self.roots} {several}" if self.roots > 1 else ""


def stationary(problem: Problem, *, limit: Literal["exact", "closure"] = "exact") -> Stationary:
    """Return the state after infinitely many steps.

    Args:
        problem: any method but clipped STE.
        limit: "exact" or "closure"; they agree for PTQ and without a weight quantizer.

    Returns:
        The error and a status: "runaway" where latent weights leave the grid for good (the error is the limit), "diverged",
        "stiff" where the law is narrower than the finest grid, "not converged" where no self-consistent noise was found.

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
    if limit == "closure":
        return _closure(problem, problem.weights)
    hard = problem.weight_decay == 0 and problem.weights.temperature == 0
    return _piecewise(problem, problem.weights) if hard else _gibbs(problem, problem.weights)


def _saturated(problem: Problem, weights: Staircase) -> float:
    """Return the error with every weight on an outermost level, on the teacher's side."""
    a, rho, R, low, high = problem.gain, problem.power, problem.teacher_power, weights.levels[0], weights.levels[-1]
    if problem.teacher == "one":
        level = high if problem.target * sqrt(R) >= high * (1 - 1e-12) else low
        return float((R - 2 * a * sqrt(R) * level + rho * level**2) / 2)
    return float((R - a * (high - low) * sqrt(2 * R / pi) + rho * (high**2 + low**2) / 2) / 2)


def _gibbs(problem: Problem, weights: Staircase) -> Stationary:
    """Solve the scalar equation for E on two fine grids, extrapolated."""
    nodes = teacher_nodes(problem, NODES // 4)
    rough, _ = _grid(problem, weights, 0.03 * _largest(problem, weights), layers=4.0)
    root = _self_consistent(problem, weights, nodes, rough)[1].root
    rough, _ = _grid(problem, weights, np.exp(root), layers=4.0)
    found = _self_consistent(problem, weights, nodes, rough)[1]
    edges, resolved = _grid(problem, weights, np.exp(found.root), layers=0.5 if problem.teacher == "one" else 2.0)
    first, fine = _self_consistent(problem, weights, nodes, edges, near=found.root)
    second, finest = _self_consistent(problem, weights, nodes, halved(edges), near=fine.root)
    errors = np.maximum((4 * second - first) / 3, 0.0)
    status, message = finest._replace(roots=found.roots).verdict("self-consistent states; this is the one with the largest noise.")
    if status == "ok" and not resolved and np.max(np.abs(second - first)) > SETTLED * np.max(second):
        status, message = "stiff", UNRESOLVED
    if problem.method == "lotion":
        if problem.strength > 1:
            message = f"{message} {WELLS}".strip()
        return Stationary(float(errors[0]), status, message, error_latent=float(errors[1]), error_randomized=float(errors[2]))
    return Stationary(float(errors[0]), status, message)


def _piecewise(problem: Problem, weights: Staircase) -> Stationary:
    """Solve the scalar equation for E with the law of hard STE without decay, a chain of exponentials, in closed form.

    The mean of psi is the target tau clipped to the levels, so 2 eps = R (1 - a^2 / rho) + rho E[(psi - tau)^2]. Of all laws on the
    levels with that mean the one on the two neighbours of tau has the least variance: that is the lower end of the bracket for E.
    """
    nodes = teacher_nodes(problem, min(NODES, max(20, 4_000_000 // len(weights.levels))))
    rho, tau = problem.power, problem.target * nodes.value[:, None]
    floor = problem.teacher_power * (1 - problem.gain**2 / rho)
    force, gap = rho * (tau - weights.levels), np.diff(weights.thresholds)
    # U at the thresholds, from the first one on
    wall = np.concatenate([np.zeros_like(tau), -np.cumsum(force[:, 1:-1] * gap, axis=1)], axis=1)
    below, above = tau[:, 0] <= weights.levels[0], tau[:, 0] >= weights.levels[-1]

    def excess_error(logarithm: float) -> float:
        """Return rho E[(psi - tau)^2] at this log E."""
        D = problem.lr * rho * np.exp(logarithm) / 2
        logits = np.empty_like(force)
        middle = (wall[:, 1:] + wall[:, :-1]) / 2
        logits[:, 1:-1] = log_sinhc(force[:, 1:-1] * gap / (2 * D)) + np.log(gap) - middle / D
        # beyond the outermost thresholds the law falls off to infinity over D / |drift|; without a pull back, all of it is there
        for k, end, drift, gone in ((0, 0, force[:, 0], below), (-1, -1, -force[:, -1], above)):
            logits[:, k] = np.where(gone, np.inf, np.log(D / np.where(gone, 1.0, drift)) - wall[:, end] / D)
        logits[below | above] = np.where(np.isinf(logits[below | above]), 0.0, -np.inf)
        masses = np.exp(logits - logits.max(axis=1, keepdims=True))
        masses /= masses.sum(axis=1, keepdims=True)
        return float(rho * nodes.mass @ np.sum(masses * (weights.levels - tau) ** 2, axis=1))

    lower, upper = bracket(weights, tau)
    inside = np.clip(tau, lower, upper)
    nearest = float(rho * nodes.mass @ ((tau - inside) ** 2 + (inside - lower) * (upper - inside))[:, 0])
    # E lies between its value with the least variance and its value with every weight on the worst level
    base, most = floor + problem.label_noise**2, float(np.log(_largest(problem, weights)))
    least = max(float(np.log(max(base + nearest, 1e-300))), most - DEEPEST)
    found = _scan(lambda x: (base + excess_error(x)) * np.exp(-x) - 1, least, most)
    status, message = found.verdict("self-consistent states; this is the one with the largest noise.")
    return Stationary(max((floor + excess_error(found.root)) / 2, 0.0), status, message)


def _grid(problem: Problem, weights: Staircase, energy: float, *, layers: float) -> tuple[Array, bool]:
    """Return the solver's own grid for a start at the target and this E, and whether it is affordable to resolve its layers."""
    start = problem.target * problem.teacher_power if problem.teacher == "one" else 0.0
    energy = max(energy, CALM[problem.teacher] * _largest(problem, weights))
    calm = replace(problem, initial_overlap=start, initial_variance=weights.range**2 / 4)
    coarse = mesh(calm, weights, np.inf, Scales(energy, np.inf, 2 * energy), layers=layers)
    # STE has a tail of growing cells beyond its start; the rest is this long at most
    span = float(np.ptp(coarse)) if problem.method == "lotion" else min(float(np.ptp(coarse)), 10 * (weights.range + abs(start)))
    affordable = 2 * float(np.max(weights.steps)) * span / (problem.lr * BUDGET[problem.teacher])
    shown = max(energy, affordable)
    return mesh(calm, weights, np.inf, Scales(shown, shown, 2 * energy), layers=layers), energy >= affordable


def _self_consistent(problem: Problem, weights: Staircase, nodes: Nodes, edges: Array, *, near: float | None = None) -> tuple[Array, Root]:
    """Return the errors of the law that has the E it was made with, and log E (one root if searched `near`)."""
    landscape, observables = build(problem, weights, nodes, edges)

    def excess(logarithm: float) -> float:
        energy = np.exp(logarithm)
        return float((landscape.energy_offset + np.sum(landscape.energy * _law(landscape, energy)) - energy) / energy)

    if near is not None and excess(near - 0.3) > 0 > excess(near + 0.3):
        found = Root(float(brentq(excess, near - 0.3, near + 0.3, xtol=1e-10)), 1, True)
    else:
        most = np.log(_largest(problem, weights))
        found = _scan(excess, most - DEEPEST, most)
    masses = _law(landscape, float(np.exp(found.root)))
    errors = observables.offset + np.einsum("enc,nc->e", observables.functional, masses)
    return np.maximum(errors, 0.0), found


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


def _scan(excess: Callable[[float], float], least: float, most: float) -> Root:
    """Return the largest root of a function that is positive below it; `least` if it is negative all over."""
    grid = np.linspace(least, most, SCAN)
    values = np.array([excess(x) for x in grid])
    crossings = np.nonzero((values[:-1] > 0) & (values[1:] <= 0))[0]
    if len(crossings) == 0:
        dead = bool(np.all(values <= 0))
        return Root(float(grid[0] if dead else grid[-1]), 0, dead)
    k = crossings[-1]
    return Root(float(brentq(excess, grid[k], grid[k + 1], xtol=1e-12)), len(crossings), bool(values[-1] <= 0))


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
    found = _scan(lambda x: state(float(np.exp(x)))[0], float(np.log(spread[0])), float(np.log(spread[1])))
    status, message = found.verdict("fixed points; this is the one with the largest spread.")
    return Stationary(state(float(np.exp(found.root)))[1], status, message)
