"""Forecast: everything the theory says about one setting, in one record. What `stepwell predict` prints."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stepwell.theory.closure import closure
from stepwell.theory.exact import exact
from stepwell.theory.linear import ptq, ptq_stationary, unquantized
from stepwell.theory.plateau import Estimate, estimate, plateau
from stepwell.theory.problem import Problem
from stepwell.theory.stability import Stability, stability
from stepwell.theory.stationary import stationary
from stepwell.theory.trajectory import Plateau, Stationary, Trajectory

TIMES = 401
SCALES = 8.0  # default horizon in units of 1 / (lr * a), the time in which the mean weight grows by one


@dataclass(frozen=True, eq=False)
class Forecast:
    """One setting, solved.

    Attributes:
        problem: what was asked.
        curve: the learning curve from 0 to the horizon.
        unquantized: the same training without a weight quantizer.
        rounded: that one, rounded at each time (PTQ).
        plateau: measured on `curve`.
        estimate: why there is a plateau, and how long it should be.
        end: the state after infinitely many steps; None where it depends on the path (clipped STE) or the theory has none.
        unquantized_end: where float training ends; `.error` after rounding, `.error_latent` before.
        stability: the linear threshold, and what quantization does beyond it.
    """

    problem: Problem
    curve: Trajectory
    unquantized: Trajectory
    rounded: Trajectory
    plateau: Plateau
    estimate: Estimate
    end: Stationary | None
    unquantized_end: Stationary
    stability: Stability


def forecast(problem: Problem, horizon: float | None = None, *, theory: Literal["exact", "closure"] = "exact") -> Forecast:
    """Solve one setting and everything it is compared with.

    Args:
        problem: constants, with a weight quantizer.
        horizon: last time t = steps / dimension; by default 8 / (lr a).
        theory: "exact" or "closure" for curve and end.

    Raises:
        ValueError: no weight quantizer, or a horizon that is not positive.
    """
    if problem.weights is None:
        raise ValueError("`problem` must have a weight quantizer: got weights=None. Use `unquantized`.")
    last = SCALES / (problem.lr * problem.gain) if horizon is None else horizon
    if not np.isfinite(last) or last <= 0:
        raise ValueError(f"`horizon` must be a finite time above 0: got {last!r}.")
    if theory not in ("exact", "closure"):
        raise ValueError(f"`theory` must be 'exact' or 'closure': got {theory!r}.")
    times = np.concatenate([[0.0], np.geomspace(1e-3 * last, last, TIMES - 1)])
    curve = (exact if theory == "exact" else closure)(problem, times)
    training = replace(problem, method="ptq", clip=None)
    return Forecast(
        problem,
        curve,
        unquantized(problem, times),
        ptq(training, times),
        plateau(curve),
        estimate(problem, last),
        None if problem.method == "clipped_ste" else stationary(problem, limit=theory),
        ptq_stationary(training),
        stability(problem),
    )
