"""The closure: reference rows, the paper-notation equations, its limits, its two paths, its status."""

import sys

import numpy as np
import pytest
from tests.reference.closure import solve
from tests.theory.rows import ROWS

from stepwell.theory import Problem, Staircase, closure, plateau, unquantized

CLOSED = [name for name, row in ROWS.items() if row.closure is not None]
UNEVEN = Staircase(3, 2.0, "levels", values=(-2.0, -0.9, -0.2, 0.1, 1.4, 1.9))

OTHERS = {
    "mid": Problem(Staircase(3, 1.2, "mid"), Staircase(3, 1.5, "mid"), lr=0.3, label_noise=0.2, teacher_power=2.0, initial_overlap=-0.4),
    "gauss": Problem(
        Staircase(2, 1.5), Staircase(2, 2.0), lr=0.4, teacher="gauss", teacher_power=0.5, weight_decay=0.2, initial_variance=0.3
    ),
    "tread": Problem(Staircase(3, 3.0, "tread"), lr=0.5, label_noise=0.4, initial_overlap=0.3, initial_variance=0.05),
    "uneven": Problem(UNEVEN, lr=0.3, weight_decay=0.1, initial_variance=0.4),
    "smooth": Problem(Staircase(2, 2.0, temperature=0.3), lr=0.3, label_noise=0.1),
    "smooth gauss": Problem(Staircase(3, 2.0, "tread", temperature=0.1), lr=0.3, teacher="gauss", initial_overlap=0.2),
}


@pytest.fixture
def without_numba(monkeypatch):
    """As on a machine where numba is not installed."""
    monkeypatch.setitem(sys.modules, "stepwell.theory.compiled", None)


@pytest.mark.parametrize("name", CLOSED)
def test_reference_rows(name):
    row = ROWS[name]
    np.testing.assert_allclose(closure(row.problem, row.times).error, row.closure, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CLOSED if ROWS[name].l10_closure])
def test_plateau_lengths_of_the_rows(name):
    row = ROWS[name]
    curve = closure(row.problem, np.linspace(0, row.times[-1], 1601))
    assert plateau(curve).l10 == pytest.approx(row.l10_closure, rel=0.02)


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_agree_with_integrals_in_paper_notation(name):
    p, times = OTHERS[name], np.array([0.0, 1.0, 4.0])
    psi = lambda w: float(p.weights(w))  # noqa: E731
    want = solve(
        psi, tuple(p.weights.thresholds), times, eta=p.lr, a=p.gain, rho=p.power, sigma=p.label_noise, lam=p.weight_decay,
        teacher=p.teacher, R=p.teacher_power, m0=p.initial_overlap, v0=p.initial_variance,
    )  # fmt: skip
    np.testing.assert_allclose(closure(p, times).error, want, atol=2e-6)  # the reference integrates to 1e-7 per step


@pytest.mark.parametrize("name", ["P1", "P5", "P8"])
def test_without_numba_the_numbers_are_the_same(name, without_numba, monkeypatch):
    row = ROWS[name]
    plain = closure(row.problem, row.times)
    monkeypatch.undo()
    np.testing.assert_allclose(plain.error, closure(row.problem, row.times).error, atol=1e-8)  # both integrate to 1e-9


def test_a_temperature_of_zero_is_the_limit():
    hard, times = ROWS["P1"].problem, ROWS["P1"].times
    gaps = []
    for T in (0.04, 0.02, 0.01):
        smooth = Problem(Staircase(2, 2.0, temperature=T), hard.inputs, lr=hard.lr)
        gaps.append(np.max(np.abs(closure(smooth, times).error - closure(hard, times).error)))
    # E[psi_T^2] - E[psi^2] is linear in T, so the gap halves
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(2, abs=0.2)


def test_a_fine_wide_grid_is_no_grid():
    # what is left is rho Delta^2 / 12 in q_psi: half of it in the error at first, growing to Delta^2 / 12 (2 - eta) times
    fine, times = Staircase(12, 8.0), np.linspace(0, 20, 9)
    gap = closure(Problem(fine, lr=0.2, label_noise=0.5), times).error - unquantized(Problem(None, lr=0.2, label_noise=0.5), times).error
    np.testing.assert_allclose(gap[0], fine.spacing**2 / 24, atol=1e-9)
    np.testing.assert_allclose(gap[-1], fine.spacing**2 / 12 / 1.8, atol=5e-9)


@pytest.mark.parametrize("teacher", ["one", "gauss"])
def test_sixteen_bits_are_unquantized_to_eight_digits(teacher):
    # Delta = 2.4e-4: Delta^2 / 12 (2 - eta) = 2.8e-9
    times = np.linspace(0, 20, 9)
    quantized = closure(Problem(Staircase(16, 8.0), lr=0.2, label_noise=0.5, teacher=teacher), times).error
    np.testing.assert_allclose(quantized, unquantized(Problem(None, lr=0.2, label_noise=0.5), times).error, atol=1e-8)


def test_status_of_a_target_beyond_the_grid():
    assert closure(ROWS["P1"].problem, [1.0]).status == "ok"
    for name in ("P5", "P6"):
        curve = closure(ROWS[name].problem, ROWS[name].times)
        assert curve.status == "runaway"
        assert "leave the grid" in curve.message
        assert np.all(np.isfinite(curve.error))


def test_a_single_time_and_a_start_later_than_zero():
    p = ROWS["P2"].problem
    assert closure(p, [0.0]).error[0] == pytest.approx(0.89886, abs=1e-5)
    np.testing.assert_allclose(closure(p, [5.0, 10.0]).error, closure(p, [0.0, 5.0, 10.0]).error[1:], atol=1e-6)


def test_a_start_without_spread_and_a_tiny_learning_rate_do_not_break_it():
    # until the first threshold every weight is w = eta t / 3 above 2/3 of ... the cell's level is 2/3, and the height (1 - 2/3)^2 / 2
    curve = closure(Problem(Staircase(2, 2.0), lr=1e-4, initial_overlap=0.7, initial_variance=0.0), [10.0, 1e3, 1e5])
    np.testing.assert_allclose(curve.error[:2], 1 / 18, atol=1e-6)
    assert curve.status == "ok"


@pytest.mark.parametrize("method", ["clipped_ste", "lotion"])
def test_methods_without_a_closed_system_are_refused(method):
    with pytest.raises(ValueError, match=f"got '{method}'.*Use `exact`"):
        closure(Problem(Staircase(2, 2.0), method=method), [1.0])
