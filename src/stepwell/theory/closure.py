"""Closure: two order parameters instead of the law of a weight, an approximation that is fast and often close.

It takes a weight to be w = (m/R) w* + s z with Gaussian z at all times. Then, with E = R + sigma^2 - 2 a m_psi + rho q_psi,
dm/dt = eta (a R - rho m_psi - lam m),    dq/dt = 2 eta (a m - rho r_psi - lam q) + eta^2 rho E,
where m_psi = E[w* psi], q_psi = E[psi^2], r_psi = E[w psi] are Gaussian integrals. (m, v) with v = s^2 = q - m^2/R is
integrated, because that difference cancels. These equations hold for the true m_psi, q_psi, r_psi; the Gaussian evaluation is
the approximation: its bias does not shrink with the dimension. `exact` has none.
Source: the order-parameter system of arXiv:2510.10693, derived again for both teachers. Symbols as in `problem`.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import odeint

from stepwell.theory.gaussian import FLOOR, moments
from stepwell.theory.linear import State, ptq, rounded_error, unquantized
from stepwell.theory.problem import Problem, check_times
from stepwell.theory.staircase import Array, Staircase
from stepwell.theory.trajectory import Status, Trajectory

RTOL, ATOL = 1e-9, 1e-12
RUNAWAY = "The target lies at or beyond the highest level: the latent weights leave the grid for good, the error still converges."

Derivative = Callable[..., Any]


def closure(problem: Problem, times: ArrayLike) -> Trajectory:
    """Return the learning curve of STE in the Gaussian closure.

    Args:
        problem: method "ste" or "ptq" (and any method without a weight quantizer, where the closure is exact).
        times: strictly increasing, >= 0, `(times,)`.

    Returns:
        The curve, with status "runaway" where the order parameters grow without bound (the error still converges).

    Raises:
        ValueError: bad times, or a method without a closed system (clipped STE, LOTION): use `exact`.

    >>> p = Problem(weights=Staircase(bits=3, range=1.5), lr=0.1, label_noise=0.3)
    >>> closure(p, [0.0, 40.0]).error.round(4)
    array([0.8989, 0.0112])
    """
    if problem.method in ("clipped_ste", "lotion"):
        raise ValueError(f"`problem` must have method 'ste' or 'ptq': got {problem.method!r}, whose law does not close. Use `exact`.")
    t = check_times(times)
    if problem.weights is None:
        return unquantized(problem, t)
    if problem.method == "ptq":
        return ptq(problem, t)
    state, status = closure_state(problem, t)
    error = rounded_error(problem, problem.weights, state)
    message = {"runaway": RUNAWAY, "stiff": "The integrator gave up: the equations are too stiff."}.get(status, "")
    return Trajectory(t, error, status, message)


def closure_state(problem: Problem, times: Array) -> tuple[State, Status]:
    """Return the order parameters of STE in the closure at the times, and the status."""
    weights = problem.weights
    assert weights is not None
    derivative, arguments = _derivative(problem, weights)
    grid = times if times[0] == 0 else np.concatenate([[0.0], times])
    start = [problem.initial_overlap, max(problem.initial_variance, (FLOOR * weights.range) ** 2)]
    if len(grid) == 1:
        return State(np.array(start[:1]), np.array(start[1:])), _status(problem)
    # odeint is LSODA without the per-step cost of solve_ivp in Python: several times faster on two equations.
    y, info = odeint(derivative, start, grid, args=arguments, rtol=RTOL, atol=ATOL, mxstep=100_000, full_output=True, tfirst=True)
    y = y[len(grid) - len(times) :]
    failed = info["message"] != "Integration successful." or not np.all(np.isfinite(y))
    return State(y[:, 0], np.maximum(y[:, 1], 0.0)), "stiff" if failed else _status(problem)


def runs_away(problem: Problem) -> bool:
    """Whether the closure has no fixed point, so that its order parameters grow for ever.

    For a teacher of equal weights this holds for the exact limit as well: every weight then leaves the grid for good.
    """
    if problem.weights is None or problem.weight_decay > 0 or problem.method != "ste":
        return False
    target, levels = problem.target * sqrt(problem.teacher_power), problem.weights.levels
    if problem.teacher == "one":
        return bool(target >= levels[-1] * (1 - 1e-12) or target <= levels[0])
    # The teacher's overlap with psi cannot exceed that of a fully saturated student.
    return bool(target >= (levels[-1] - levels[0]) / 2 * sqrt(2 / pi))


def order_parameters(t: float, y: Array, problem: Problem, weights: Staircase) -> tuple[float, float]:
    """Return (dm/dt, dv/dt); with E[w psi] = mu E[psi] + s^2 E[psi'] the cancelling terms of dv/dt drop out."""
    a, rho, eta, lam, R = problem.gain, problem.power, problem.lr, problem.weight_decay, problem.teacher_power
    m, v = float(y[0]), max(float(y[1]), 0.0)
    if problem.teacher == "one":
        g = moments(weights, m / sqrt(R), sqrt(v))
        overlap = sqrt(R) * float(g.mean)
    else:
        g = moments(weights, 0.0, sqrt(v + m * m / R))
        overlap = m * float(g.slope)
    energy = R + problem.label_noise**2 - 2 * a * overlap + rho * float(g.square)
    dm = eta * (a * R - rho * overlap - lam * m)
    dv = -2 * eta * (rho * float(g.slope) + lam) * v + eta**2 * rho * energy
    return dm, dv


def _derivative(problem: Problem, weights: Staircase) -> tuple[Derivative, tuple[Any, ...]]:
    """Return the right-hand side and its arguments: compiled where numba is installed and the staircase is hard."""
    if weights.temperature == 0:
        try:
            from stepwell.theory.compiled import order_parameters as compiled
        except ImportError:
            return order_parameters, (problem, weights)
        p = problem
        constants = np.array([p.gain, p.power, p.lr, p.weight_decay, p.teacher_power, p.label_noise, FLOOR * weights.range])
        return compiled, (constants, weights.levels, weights.thresholds, problem.teacher == "gauss")
    return order_parameters, (problem, weights)


def _status(problem: Problem) -> Status:
    return "runaway" if runs_away(problem) else "ok"
