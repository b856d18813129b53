"""The simulator against the limit of infinite dimension: the distance falls as d^(-1/2)."""

from math import sqrt

import numpy as np
import pytest
from scipy.special import ndtr

from stepwell.theory.exact import exact
from stepwell.theory.problem import Problem
from stepwell.theory.simulate import simulate, simulate_weights
from stepwell.theory.staircase import Staircase

pytest.importorskip("numba")

COARSE, FINE = Staircase(2, 2.0), Staircase(4, 2.0)
ROWS = {
    "P1": Problem(COARSE, COARSE, lr=0.2),
    "P2": Problem(Staircase(3, 1.5), lr=0.1, label_noise=0.3),
    "P3": Problem(FINE, FINE, lr=0.5, label_noise=0.5),
    "P4": Problem(Staircase(3, 4.0, "tread"), lr=0.1, initial_variance=0.01),
    "P5": Problem(Staircase(1, 1.0), lr=0.3, label_noise=0.2, teacher="gauss"),
}
OTHERS = {
    "P7": Problem(Staircase(3, 2.0), lr=2.5, label_noise=0.3),
    "P8": Problem(COARSE, lr=0.2, label_noise=0.3, weight_decay=0.1),
    "P9": Problem(Staircase(3, 2.0), method="lotion", lr=0.1),
    "P10": Problem(Staircase(3, 2.0), method="ptq", lr=0.1, label_noise=0.5),
    "P11": Problem(COARSE, method="clipped_ste", lr=0.2, label_noise=0.3),
    "smeared": Problem(Staircase(2, 2.0, temperature=0.5), COARSE, lr=0.2, label_noise=0.3),
    "uneven": Problem(Staircase(2, 2.0, "levels", values=(-2.0, -0.5, 0.2, 1.5)), lr=0.2, label_noise=0.3),
    "gauss lotion": Problem(COARSE, COARSE, method="lotion", lr=0.2, teacher="gauss", label_noise=0.2),
}
TIMES = np.linspace(0, 20, 81)


@pytest.fixture(scope="module")
def limit() -> dict[str, np.ndarray]:
    return {name: exact(p, TIMES).error for name, p in (ROWS | OTHERS).items()}


@pytest.mark.parametrize("name", ROWS | OTHERS)
def test_distance_to_the_limit(limit, name):
    # The bounds are those of the specification: twice to five times what was measured elsewhere with other code.
    d = 1000
    distance = np.abs(simulate((ROWS | OTHERS)[name], TIMES, dim=d, seeds=4).error - limit[name]) * sqrt(d)
    assert np.max(distance) <= 4
    assert np.trapezoid(distance, TIMES) / TIMES[-1] <= 0.7


@pytest.mark.parametrize("name", [name for name in ROWS | OTHERS if name != "smeared"])
def test_mean_over_many_seeds_is_the_limit(limit, name):
    # The noise of the mean is known from the seeds; what is left is the bias of order 1/d: at d = 800 and for errors of order one
    # a few thousandths (the specification measured at most 0.002 here).
    few = [0, 8, 20, 40, 80]
    trajectory = simulate((ROWS | OTHERS)[name], TIMES[few], dim=800, seeds=24, seed=11)
    assert np.all(np.abs(trajectory.error - limit[name][few]) < 4 * trajectory.stderr + 3e-3)


def test_distance_falls_with_the_root_of_the_dimension(limit):
    dims, sup = np.array([300, 600, 1200, 2400]), []
    for d in dims:
        runs = [(name, simulate(p, TIMES, dim=int(d), seeds=1, seed=100 + k)) for name, p in ROWS.items() for k in range(8)]
        distances = [np.max(np.abs(run.error - limit[name])) for name, run in runs]
        sup.append(np.mean(distances))
    # One distance scatters by a third, the mean of 40 by 5 %; over ln(8) = 2.1 that is 0.04 in the slope.
    slope = np.polyfit(np.log(dims), np.log(sup), 1)[0]
    assert abs(slope + 0.5) < 0.1


def test_weights_follow_the_density():
    p = Problem(COARSE, COARSE, lr=0.1)
    times, d = [10, 25], 1500
    law = exact(p, times, density=True).density
    for k, weights in enumerate(simulate_weights(p, times, dim=d, seed=3).weights[:, 0]):
        sorted_weights = np.sort(weights)
        theory = np.interp(sorted_weights, law.edges[0], law.cdf(k))
        ranks = np.arange(d + 1) / d
        distance = max(np.max(np.abs(theory - ranks[:-1])), np.max(np.abs(theory - ranks[1:])))
        # 1.95 / sqrt(n) is the critical value at 0.1 % for independent draws; the weights of one run also share its fluctuation,
        # which moves all of them together by some d^(-1/2).
        assert distance < 1.95 / sqrt(d)
        normal = ndtr((sorted_weights - weights.mean()) / weights.std())
        assert np.max(np.abs(normal - ranks[1:])) > 3 / sqrt(d)  # no Gaussian would do


def test_iid_start_scatters_more_than_the_quantile_start():
    p = ROWS["P1"]
    iid = simulate(p, [0, 1], dim=500, seeds=16, start="iid").stderr
    quantile = simulate(p, [0, 1], dim=500, seeds=16).stderr
    assert iid[0] > 20 * quantile[0]
    assert iid[0] == pytest.approx(np.sqrt(np.var(initial_terms(p), ddof=0) / (500 * 16)), rel=0.6)  # 4 sigma of a deviation over 16 seeds


def initial_terms(p: Problem) -> np.ndarray:
    """Return what each of many independent weights adds to the error at the start."""
    psi = p.weights(np.random.default_rng(0).standard_normal(200_000))
    return (1 - 2 * p.gain * psi + p.power * psi**2) / 2


@pytest.mark.slow
def test_first_drop_of_the_one_bit_gaussian_teacher_agrees_with_simulation():
    """The specification's row P5 says .256 for the exact L10; the solver says .2476, and so does the experiment.

    Forty runs at d = 20,000 leave a standard error of 7e-4 in the error, at a slope of -.27 that is 2.7e-3 in time; three are allowed.
    """
    p = Problem(weights=Staircase(1, 1.0), lr=0.3, label_noise=0.2, teacher="gauss")
    times = np.linspace(0, 0.6, 61)
    whole = exact(p, np.concatenate([times, [5.0, 10.0, 20.0]]))
    level = whole.error[0] - 0.1 * (whole.error[0] - whole.error.min())
    run = simulate(p, times, dim=20_000, seeds=40, seed=1)
    ours, found = (float(np.interp(-level, -curve, times)) for curve in (whole.error[:61], run.error))
    assert run.stderr is not None
    slope = (run.error[20] - run.error[30]) / (times[30] - times[20])
    assert abs(ours - found) < 3 * float(run.stderr[25]) / slope
    assert ours == pytest.approx(0.2476, abs=5e-4)
