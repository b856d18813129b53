"""The drift, the coupling and the observables of each method, on a grid: what the Fokker-Planck solver is fed with.

Drift over eta, g = -U':  STE  a w* - rho psi(w) - lam w;  LOTION  a w* - rho (1 - lambda) w - lambda rho c(w) - lam w, where c
is the midpoint of the lattice cell, so that U = rho (w^2 + lambda (w - lower)(upper - w)) / 2 - a w* w + lam w^2 / 2.
Coupling: STE  E = R + sigma^2 - 2 a m_psi + rho q_psi;  LOTION  E = R + sigma^2 - 2 a m + rho q of the latent weights.
Symbols as in `problem`.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from stepwell.theory.cells import cells, integral, lattice, rounding_variance, rounding_variance_integral
from stepwell.theory.fokker_planck import Landscape
from stepwell.theory.gaussian import FLOOR
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import Array, Staircase

NARROW = 1e-2  # intervals of the teacher that shift the start by less than this part of its width are as good as points


class Nodes(NamedTuple):
    """A quadrature over the teacher: values w* and their weights, `(nodes,)`."""

    value: Array
    mass: Array


class Observables(NamedTuple):
    """Errors as linear functionals of the masses: offset + sum of functional * masses."""

    functional: Array
    """`(errors, nodes, cells + 2)`"""
    offset: float


def teacher_nodes(problem: Problem, count: int) -> Nodes:
    """Return the teacher's law: one node, or the midpoint rule on a Gaussian.

    Gauss-Hermite nodes are not accurate here: the error of one weight has kinks in w*. By odd symmetry half of the nodes are
    enough unless the levels are asymmetric.
    """
    scale = np.sqrt(problem.teacher_power)
    if problem.teacher == "one":
        return Nodes(np.array([scale]), np.ones(1))
    x = (np.arange(count) + 0.5) * 4.5 / count
    if problem.weights is None or not problem.weights.symmetric:
        x = np.concatenate([-x[::-1], x])
    mass = np.exp(-0.5 * x * x)
    mass /= mass.sum()
    # The nodes carry the second moment exactly, so that the error of a zero student is exact.
    return Nodes(scale * x / np.sqrt(mass @ x**2), mass)


def start(problem: Problem, nodes: Nodes, edges: Array) -> Array:
    """Return the masses at t = 0, `(nodes, cells + 2)`; what lies beyond the ends is in the first and last entry.

    A node stands for an interval of teacher values. Where the start follows the teacher its law is averaged over that interval:
    narrow starts at the nodes alone would pass the thresholds one at a time, an error of first order.
    """
    s = max(np.sqrt(problem.initial_variance), FLOOR)
    mean = problem.initial_overlap / problem.teacher_power * nodes.value[:, None]
    half = (
        abs(problem.initial_overlap / problem.teacher_power) * float(nodes.value[1] - nodes.value[0]) / 2 if len(nodes.value) > 1 else 0.0
    )
    z = (edges - mean) / s
    if half > NARROW * s:
        left = np.concatenate([np.zeros_like(mean), _mean_ndtr(z, half / s), np.ones_like(mean)], axis=1)
        return np.maximum(np.diff(left, axis=1), 0.0)
    inside = np.where(z[:, :-1] > 0, ndtr(-z[:, :-1]) - ndtr(-z[:, 1:]), ndtr(z[:, 1:]) - ndtr(z[:, :-1]))
    return np.concatenate([ndtr(z[:, :1]), inside, ndtr(-z[:, -1:])], axis=1)


def _mean_ndtr(z: Array, half: float) -> Array:
    """Return the mean of the normal distribution function over z - half ... z + half."""
    low, high = z - half, z + half
    density = (np.exp(-0.5 * high * high) - np.exp(-0.5 * low * low)) / np.sqrt(2 * np.pi)
    return np.asarray((high * ndtr(high) - low * ndtr(low) + density) / (2 * half))


def build(problem: Problem, weights: Staircase, nodes: Nodes, edges: Array) -> tuple[Landscape, Observables]:
    """Return the landscape of a problem on a grid, and its errors.

    Args:
        problem: constants.
        weights: its weight quantizer.
        nodes: teacher quadrature.
        edges: cell boundaries, `(cells + 1,)`.
    """
    c = cells(weights, edges)
    a, rho, lam, R = problem.gain, problem.power, problem.weight_decay, problem.teacher_power
    target = a * nodes.value[:, None]
    points = np.concatenate([edges[:1], c.center, edges[-1:]])
    gap = np.diff(points)
    if problem.method == "lotion":
        levels = lattice(weights, float(np.max(np.abs(edges))))
        smooth = rho * (points**2 + problem.strength * rounding_variance(levels, points)) / 2
        k = np.searchsorted(levels, c.center)
        slope = rho * ((1 - problem.strength) * c.center + problem.strength * (levels[k] + levels[k - 1]) / 2)
    else:
        smooth, slope = rho * integral(weights, points), rho * c.psi
    potential = smooth + lam * points**2 / 2 - target * points
    force = target - slope - lam * c.center
    observed = [_errors(problem, nodes, c.psi, c.psi_squared, _ends(weights(edges[[0, -1]])))]
    if problem.method == "lotion":
        mean_square = c.center**2 + c.width**2 / 12
        observed.append(_errors(problem, nodes, c.center, mean_square, _ends(edges[[0, -1]])))
        rounding = np.diff(rounding_variance_integral(levels, edges)) / c.width
        observed.append(observed[1] + _errors(problem, nodes, 0 * c.center, rounding, np.zeros((2, 2))))
    coupling = observed[1] if problem.method == "lotion" else observed[0]
    landscape = Landscape(
        c.width, gap, potential, force, 2 * coupling, R + problem.label_noise**2, problem.lr * rho / 2, problem.method == "clipped_ste"
    )
    return landscape, Observables(np.array(observed), R / 2)


def _errors(problem: Problem, nodes: Nodes, value: Array, square: Array, ends: Array) -> Array:
    """Return the functional (-2 a w* value + rho square) / 2, weighted by the teacher, `(nodes, cells + 2)`."""
    value = np.concatenate([ends[0, :1], value, ends[0, 1:]])
    square = np.concatenate([ends[1, :1], square, ends[1, 1:]])
    return nodes.mass[:, None] * (problem.power * square / 2 - problem.gain * nodes.value[:, None] * value)


def _ends(value: Array) -> Array:
    return np.array([value, value**2])
