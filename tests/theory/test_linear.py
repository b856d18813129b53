"""Unquantized training and PTQ: the closed form against an integrator and the reference row."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from tests.theory.rows import LATENT, ROWS

from stepwell.theory import Problem, Staircase, closure, exact, ptq, stationary, unquantized
from stepwell.theory.linear import linear_state

TWO = Staircase(2, 2.0)
TIMES = np.linspace(0, 20, 41)


def integrated(p: Problem, times):
    """The same two linear equations by a general-purpose integrator."""
    a, rho, eta, lam, R = p.gain, p.power, p.lr, p.weight_decay, p.teacher_power

    def derivative(t, y):
        m, v = y
        E = R + p.label_noise**2 - 2 * a * m + rho * (v + m * m / R)
        return [eta * (a * R - (rho + lam) * m), -2 * eta * (rho + lam) * v + eta**2 * rho * E]

    return solve_ivp(
        derivative, (0, times[-1]), [p.initial_overlap, p.initial_variance], t_eval=times, method="DOP853", rtol=1e-12, atol=1e-13
    ).y


@pytest.mark.parametrize(
    "problem",
    [
        Problem(None, lr=0.1, label_noise=0.5),
        Problem(None, TWO, lr=0.7, teacher_power=2.0, initial_overlap=-0.5, initial_variance=0.3),
        Problem(None, TWO, lr=0.3, weight_decay=0.4, teacher="gauss", label_noise=0.2),
        Problem(None, lr=1.0, label_noise=0.1),  # kappa = eta k: two rates meet
        Problem(None, lr=2.0 / 3.0, weight_decay=0.5, initial_overlap=0.3),
        Problem(None, lr=2.0, label_noise=0.1),  # kappa = 0
    ],
)
def test_closed_form_solves_the_equations(problem):
    state = linear_state(problem, TIMES)
    m, v = integrated(problem, TIMES)
    np.testing.assert_allclose(state.m, m, atol=1e-9)
    np.testing.assert_allclose(state.v, v, rtol=1e-9, atol=1e-9)


def test_ptq_reference_row_before_and_after_rounding():
    row = ROWS["P10"]
    curve = ptq(row.problem, row.times)
    np.testing.assert_allclose(curve.error, row.exact, atol=1e-5)
    np.testing.assert_allclose(curve.error_latent, LATENT["P10"], atol=1e-5)
    end = stationary(row.problem)
    assert (end.error, end.error_latent) == (pytest.approx(0.01892, abs=1e-5), pytest.approx(0.00658, abs=1e-5))


@pytest.mark.parametrize("solver", [exact, closure], ids=["exact", "closure"])
def test_every_solver_takes_the_closed_form_where_it_is_exact(solver):
    float_weights = Problem(None, TWO, lr=0.3, label_noise=0.2)
    np.testing.assert_allclose(solver(float_weights, TIMES).error, unquantized(float_weights, TIMES).error, atol=1e-8)
    rounded = ROWS["P10"].problem
    np.testing.assert_allclose(solver(rounded, TIMES).error, ptq(rounded, TIMES).error, atol=1e-8)


def test_beyond_the_threshold_the_curve_says_that_it_diverged():
    curve = unquantized(Problem(None, lr=2.5, label_noise=0.1), [0.0, 5.0, 1e5])
    assert curve.status == "diverged"
    assert "threshold" in curve.message
    assert np.isinf(curve.error[-1])
    assert not np.any(np.isnan(curve.error))
    rounded = ptq(Problem(TWO, method="ptq", lr=2.5, label_noise=0.1), [0.0, 5.0, 1e5])
    assert rounded.status == "diverged"
    # an exploded Gaussian rounds to +-2 at random, independent of the teacher: (1 + 4) / 2
    assert rounded.error[-1] == pytest.approx(2.5, abs=1e-6)
    assert stationary(Problem(None, lr=2.5)).status == "diverged"


def test_ptq_needs_a_grid():
    with pytest.raises(ValueError, match="weights=None"):
        ptq(Problem(None), TIMES)
