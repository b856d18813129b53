"""Unquantized training and rounding after it: exact, in closed form.

Without weight quantization the drift is linear, so a weight given its teacher stays Gaussian: w ~ N((m/R) w*, v) for ever. PTQ
rounds that Gaussian. With k = rho + lam and kappa = 2 eta k - (eta rho)^2:
m(t) = a R / k + delta exp(-eta k t),    dv/dt = -kappa v + eta^2 rho (R + sigma^2 - 2 a m + rho m^2 / R).
The inhomogeneous term is a sum of three exponentials, hence the solution. Symbols as in `problem`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stepwell.theory.gaussian import levels, moments
from stepwell.theory.problem import Problem, check_times
from stepwell.theory.staircase import Array, Staircase
from stepwell.theory.trajectory import Stationary, Status, Trajectory


class State(NamedTuple):
    """Order parameters of a Gaussian student: overlap m = E[w* w] and variance v of w given w*, each `(times,)`."""

    m: Array
    v: Array


def linear_state(problem: Problem, times: ArrayLike) -> State:
    """Return the order parameters of unquantized training at the times; infinite where they overflow."""
    t = check_times(times)
    a, rho, eta, R = problem.gain, problem.power, problem.lr, problem.teacher_power
    k = rho + problem.weight_decay
    kappa = 2 * eta * k - (eta * rho) ** 2
    end = a * R / k
    delta = problem.initial_overlap - end
    force = (R + problem.label_noise**2 - 2 * a * end + rho * end**2 / R, 2 * delta * (rho * end / R - a), rho * delta**2 / R)
    with np.errstate(over="ignore"):
        m = end + delta * np.exp(-eta * k * t)
        v = problem.initial_variance * np.exp(-kappa * t)
        for j, strength in enumerate(force):
            if strength != 0:
                v = v + eta**2 * rho * strength * _convolved(kappa, j * eta * k, t)
    return State(m, v)


def linear_error(problem: Problem, state: State) -> Array:
    """Return eps_g of the latent weights, `(times,)`."""
    R = problem.teacher_power
    return np.asarray((R - 2 * problem.gain * state.m + problem.power * (state.v + state.m**2 / R)) / 2)


def rounded_error(problem: Problem, weights: Staircase, state: State) -> Array:
    """Return eps_g of the rounded weights where the latent ones are Gaussian with this state, `(times,)`."""
    a, rho, R = problem.gain, problem.power, problem.teacher_power
    if problem.teacher == "one":
        mean, square = levels(weights, state.m / np.sqrt(R), np.sqrt(state.v))
        overlap = np.sqrt(R) * mean
    else:
        g = moments(weights, 0.0, np.sqrt(state.v + state.m**2 / R))
        overlap, square = state.m * g.slope, g.square
    return np.asarray((R - 2 * a * overlap + rho * square) / 2)


def unquantized(problem: Problem, times: ArrayLike) -> Trajectory:
    """Return the learning curve with float weights (quantized inputs stay); exact.

    Args:
        problem: constants; its weight quantizer is ignored.
        times: strictly increasing, >= 0, `(times,)`.

    Returns:
        The curve; status "diverged" where lr is beyond the linear threshold.
    """
    t = check_times(times)
    error = linear_error(problem, linear_state(problem, t))
    return Trajectory(t, error, *_verdict(problem, error))


def ptq(problem: Problem, times: ArrayLike) -> Trajectory:
    """Return the learning curve of rounding the weights of unquantized training at each time; exact.

    Args:
        problem: constants; `weights` is the quantizer of the rounding.
        times: strictly increasing, >= 0, `(times,)`.

    Returns:
        `.error` after rounding, `.error_latent` before.
    """
    if problem.weights is None:
        raise ValueError("`problem` must have a weight quantizer to round with: got weights=None. Use `unquantized`.")
    t = check_times(times)
    state = linear_state(problem, t)
    bounded = State(np.clip(state.m, -1e150, 1e150), np.minimum(state.v, 1e150))  # beyond it only the signs count
    latent = linear_error(problem, state)
    status, message = _verdict(problem, latent)
    return Trajectory(t, rounded_error(problem, problem.weights, bounded), status, message, error_latent=latent)


def linear_stationary(problem: Problem) -> tuple[State, Status]:
    """Return where unquantized training ends, and "diverged" with an infinite variance beyond the threshold."""
    a, rho, eta, R = problem.gain, problem.power, problem.lr, problem.teacher_power
    k = rho + problem.weight_decay
    kappa = 2 * eta * k - (eta * rho) ** 2
    m = a * R / k
    force = R + problem.label_noise**2 - 2 * a * m + rho * m**2 / R
    v = eta**2 * rho * force / kappa if kappa > 0 else np.inf
    return State(np.array(m), np.array(v)), "ok" if kappa > 0 else "diverged"


def ptq_stationary(problem: Problem) -> Stationary:
    """Return the end of unquantized training, rounded; `.error_latent` before rounding."""
    state, status = linear_stationary(problem)
    latent = float(linear_error(problem, state))
    if problem.weights is None:
        return Stationary(latent, status, _DIVERGED if status != "ok" else "")
    bounded = State(state.m, np.minimum(state.v, 1e150))
    error = float(rounded_error(problem, problem.weights, bounded))
    return Stationary(error, status, _DIVERGED if status != "ok" else "", error_latent=latent)


_DIVERGED = "The learning rate is beyond the linear threshold: the latent weights grow without bound."


def _verdict(problem: Problem, error: Array) -> tuple[Status, str]:
    if linear_stationary(problem)[1] != "ok" or not np.all(np.isfinite(error)):
        return "diverged", _DIVERGED
    return "ok", ""


def _convolved(kappa: float, rate: float, t: Array) -> Array:
    """Return the integral over s from 0 to t of exp(-kappa (t - s) - rate s), also where the two rates meet."""
    gap = kappa - rate
    if abs(gap) * float(t[-1]) < 1e-8:
        return np.asarray(t * np.exp(-rate * t))
    if gap > 0:
        return np.asarray(np.exp(-rate * t) * -np.expm1(-gap * t) / gap)
    return np.asarray(np.exp(-kappa * t) * np.expm1(gap * t) / gap)
