"""Stability: where unquantized training diverges, and why rounded weights do not.

The linear model is stable iff kappa = 2 eta (rho + lam) - (eta rho)^2 > 0, that is eta rho < 2 without decay. A saturating staircase
makes the drift bounded and, for a target inside the levels, restoring: a stationary law then exists for every learning rate.
Symbols as in `problem`.
"""

from math import erfc, sqrt
from typing import NamedTuple

from stepwell.theory.closure import runs_away
from stepwell.theory.linear import linear_stationary
from stepwell.theory.problem import Problem


class Stability(NamedTuple):
    """What the constants say about boundedness."""

    linear_threshold: float
    """learning rate at which unquantized training diverges"""
    linear_stable: bool
    """whether unquantized training converges at this learning rate"""
    stable: bool
    """whether the error of this method converges"""
    confined: bool
    """whether a stationary law of the latent weights exists at every learning rate"""
    runaway: float
    """fraction of weights that leave the grid for good"""


def stability(problem: Problem) -> Stability:
    """Return where the linear model diverges and what this method does there.

    >>> from stepwell.theory.staircase import Staircase
    >>> stability(Problem(weights=Staircase(bits=3, range=2.0), lr=2.5))
    Stability(linear_threshold=2.0, linear_stable=False, stable=True, confined=True, runaway=0.0)
    """
    threshold = 2 * (problem.power + problem.weight_decay) / problem.power**2
    linear = linear_stationary(problem)[1] == "ok"
    quantized = problem.weights is not None and problem.method in ("ste", "clipped_ste")
    runaway = _runaway(problem) if quantized else 0.0
    confined = quantized and runaway == 0.0
    return Stability(threshold, linear, quantized or linear, confined, runaway)


def _runaway(problem: Problem) -> float:
    """Return P(|a w* / rho| >= highest level), for levels symmetric about zero; decay and clipping bound every weight."""
    if problem.method == "clipped_ste" or problem.weight_decay > 0 or problem.weights is None:
        return 0.0
    if problem.teacher == "one":
        return float(runs_away(problem))
    scale = problem.target * sqrt(2 * problem.teacher_power)
    return 0.5 * erfc(float(problem.weights.levels[-1]) / scale) + 0.5 * erfc(-float(problem.weights.levels[0]) / scale)
