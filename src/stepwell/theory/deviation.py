"""Deviation of the fixed point from unquantized training, in the two limits that have a formula.

Noise spreads a weight by about s = sqrt(eta E / 2). Low noise (s << Delta): a weight alternates between the two levels around its
target tau = a w* / rho with mean tau, so 2 eps = R (1 - a^2 / rho) + rho (tau - lower)(upper - tau), whatever lr and label noise are.
High resolution (s >> Delta, nothing saturated): eps - eps_lin = rho Delta^2 / (12 (2 - eta rho)). Both fall as 4^-bits.
Source: the fixed-point analysis of arXiv:2510.10693, derived again. Symbols as in `problem`.
"""

import numpy as np

from stepwell.theory.landscape import teacher_nodes
from stepwell.theory.linear import linear_error, linear_stationary
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import Array, Staircase

NODES = 4000


def low_noise(problem: Problem) -> float:
    """Return the final error of STE as the learning rate goes to zero; saturated targets stick to the outermost level.

    Raises:
        ValueError: weights that are not hard quantized, another method than STE, or weight decay, which moves the target.

    >>> p = Problem(weights=Staircase(bits=2, range=2.0))
    >>> round(low_noise(p), 6)   # levels 2/3 and 2 around 1: (1/3)(1) / 2
    0.166667
    """
    weights, a, rho, R = _ste(problem), problem.gain, problem.power, problem.teacher_power
    _without_decay(problem)
    nodes = teacher_nodes(problem, NODES)
    tau = problem.target * nodes.value
    lower, upper = bracket(weights, tau)
    inside = np.clip(tau, lower, upper)
    spread = (inside - lower) * (upper - inside)
    each = rho * ((tau - inside) ** 2 + spread)
    return float(nodes.mass @ each + R * (1 - a * a / rho)) / 2


def rounded(problem: Problem) -> float:
    """Return the final error of plain rounding as the learning rate goes to zero: never above `low_noise`.

    Raises:
        ValueError: weights that are not hard quantized, or weight decay, which moves the target.
    """
    weights, a, rho, R = _hard(problem), problem.gain, problem.power, problem.teacher_power
    _without_decay(problem)
    nodes = teacher_nodes(problem, NODES)
    tau = problem.target * nodes.value
    return float(nodes.mass @ (rho * (tau - weights(tau)) ** 2) + R * (1 - a * a / rho)) / 2


def high_resolution(problem: Problem) -> float:
    """Return the final error of STE where steps are far smaller than the noise and nothing saturates.

    Raises:
        ValueError: another method than STE, unequal steps, or a learning rate beyond the linear threshold, where the formula does not hold.
    """
    weights = _ste(problem)
    if weights.spacing is None:
        raise ValueError(f"`weights` must have equal steps: got steps from {weights.steps.min():g} to {weights.steps.max():g}.")
    state, status = linear_stationary(problem)
    if status != "ok" or problem.weight_decay > 0:
        raise ValueError(
            f"`lr` must be below the linear threshold {2 / problem.power:g}, and `weight_decay` 0: "
            f"got lr={problem.lr:g} and weight_decay={problem.weight_decay:g}."
        )
    shift = problem.power * weights.spacing**2 / (12 * (2 - problem.lr * problem.power))
    return float(linear_error(problem, state)) + shift


def bracket(weights: Staircase, w: Array) -> tuple[Array, Array]:
    """Return the neighbouring levels around `w`; outside the grid the outermost pair."""
    k = np.clip(np.searchsorted(weights.levels, w), 1, len(weights.levels) - 1)
    return weights.levels[k - 1], weights.levels[k]


def _hard(problem: Problem) -> Staircase:
    if problem.weights is None or problem.weights.temperature > 0:
        raise ValueError(f"`problem` must have hard quantized weights: got weights={problem.weights!r}.")
    return problem.weights


def _ste(problem: Problem) -> Staircase:
    if problem.method != "ste":
        raise ValueError(f"`problem` must have method 'ste': got {problem.method!r}. Use `stationary`.")
    return _hard(problem)


def _without_decay(problem: Problem) -> None:
    if problem.weight_decay > 0:
        raise ValueError(f"`weight_decay` must be 0: got {problem.weight_decay:g}. Use `stationary` with a small learning rate.")
