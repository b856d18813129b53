"""Plateaus: the measurement on curves known in closed form, the estimates against the solver and the published table."""

import numpy as np
import pytest
from tests.theory.rows import ROWS

from stepwell.theory import Problem, Staircase, Trajectory, closure, estimate, exact, plateau


def curve(error):
    t = np.linspace(0, 10, 1001)
    return Trajectory(t, error(t))


def test_a_straight_line_passes_its_tenths_at_tenths():
    p = plateau(curve(lambda t: 1 - t / 10))
    assert (p.l10, p.l90, p.sharpness, p.drop) == (pytest.approx(1), pytest.approx(9), pytest.approx(8), pytest.approx(1))


def test_interpolation_between_times_is_linear():
    assert plateau(Trajectory(np.array([0.0, 4.0]), np.array([1.0, 0.0]))).l10 == pytest.approx(0.4)


def test_a_drop_from_a_plateau_is_sharp():
    p = plateau(curve(lambda t: 1 / (1 + np.exp(10 * (t - 5)))))
    assert p.l10 == pytest.approx(5 - np.log(9) / 10, abs=1e-3)
    assert p.sharpness < 0.1


def test_the_window_of_the_overshoot_does_not_count_as_drop():
    p = plateau(curve(lambda t: np.where(t < 5, 1 - t / 5, (t - 5) / 10)))
    assert (p.l10, p.drop) == (pytest.approx(0.5), pytest.approx(1))


def test_a_later_plateau_is_found():
    steps = lambda t: 1 - 0.5 / (1 + np.exp(-20 * (t - 1))) - 0.5 / (1 + np.exp(-20 * (t - 8)))  # noqa: E731
    low, high = plateau(curve(steps)).flat
    # 5 % of the range below and above one half: ln(1/0.05 - 1) / 20 = .15 from the edges, half of 5 % on each side at least
    assert low == pytest.approx(1, abs=0.3)
    assert high == pytest.approx(8, abs=0.3)


def test_a_rising_curve_has_no_plateau():
    p = plateau(curve(lambda t: 1 + t))
    assert np.isinf(p.l10)
    assert p.drop == 0


DEAD = [
    (2.0, 0.02, 0.01, 60, 16.7, 9.18, 9.45),
    (3.0, 0.02, 0.01, 60, 25.0, 16.5, 17.1),
    (4.0, 0.02, 0.01, 60, 33.3, 23.5, 24.6),
    (5.0, 0.02, 0.01, 80, 41.7, 30.2, 31.7),
    (5.5, 0.02, 0.01, 80, 45.8, 33.5, 35.3),
    (4.0, 0.1, 0.01, 20, 6.67, 3.6, 3.83),
]


@pytest.mark.parametrize(("omega", "lr", "v0", "window", "scale", "l10", "measured"), DEAD)
def test_dead_zone_estimates(omega, lr, v0, window, scale, l10, measured):
    p = Problem(Staircase(3, omega, "tread"), lr=lr, initial_variance=v0)
    e = estimate(p, window)
    assert e.mechanism == "dead zone"
    assert e.scale == pytest.approx(scale, rel=0.003)
    assert e.l10 == pytest.approx(l10, rel=0.02)
    assert plateau(exact(p, np.linspace(0, window, 401))).l10 == pytest.approx(measured, rel=0.02)


def test_dead_zone_at_a_tiny_learning_rate():
    p = Problem(Staircase(3, 4.0, "tread"), lr=0.005, initial_variance=4e-4)
    assert estimate(p, 250).l10 == pytest.approx(118, rel=0.05)
    assert plateau(exact(p, np.linspace(0, 250, 801))).l10 == pytest.approx(118.5, rel=0.05)
    assert plateau(closure(p, np.linspace(0, 250, 801))).l10 == pytest.approx(120, rel=0.05)


@pytest.mark.parametrize(
    ("omega", "window", "scale", "l10", "measured", "closed"),
    [
        (0.1, 400, 125.5, 15.77, 15.73, 15.80),
        (0.25, 300, 50.6, 6.36, 6.28, 6.38),
        (0.5, 160, 26.0, 3.27, 3.10, 3.24),
        (1.0, 80, 14.45, 1.82, 1.37, 1.55),
    ],
)
def test_saturation_estimates(omega, window, scale, l10, measured, closed):
    grid = Staircase(2, omega)
    p = Problem(grid, grid, lr=0.1)
    e = estimate(p, window)
    assert (e.mechanism, e.scale, e.l10) == ("saturation", pytest.approx(scale, rel=0.003), pytest.approx(l10, rel=0.003))
    times = np.linspace(0, window, 1601)
    assert plateau(exact(p, times)).l10 == pytest.approx(measured, rel=0.02)
    assert plateau(closure(p, times)).l10 == pytest.approx(closed, rel=0.02)


@pytest.mark.parametrize(("omega", "length", "height"), [(1.05, 10.8, 0.211), (1.2, 13.3, 0.180)])
def test_in_cell_estimates(omega, length, height):
    p = Problem(Staircase(2, omega), lr=0.1, initial_variance=0.01)
    e = estimate(p, 60)
    assert (e.mechanism, e.l10, e.height) == ("in-cell", pytest.approx(length, rel=0.005), pytest.approx(height, abs=5e-4))
    # the measured flat window has this height; its length only the scale
    t = np.linspace(0, 60, 601)
    curve = exact(p, t)
    low, high = plateau(curve).flat
    inside = (t >= low) & (t <= high)
    assert np.mean(curve.error[inside]) == pytest.approx(height, abs=0.01)


def test_a_start_wider_than_the_steps_has_no_plateau():
    for name in ("P1", "P2", "P3", "P8"):
        assert estimate(ROWS[name].problem, 40.0).mechanism == "none"
    assert estimate(Problem(None), 40.0).mechanism == "none"


def test_a_gaussian_teacher_saturates_with_its_own_constant():
    # E[w* sign w] rises as x / sqrt(1 + x^2) with x = eta a t: a tenth at x = .1005
    grid = Staircase(2, 0.1)
    p = Problem(grid, grid, lr=0.1, teacher="gauss")
    assert plateau(closure(p, np.linspace(0, 400, 1601))).l10 == pytest.approx(estimate(p, 400).l10, rel=0.05)


@pytest.mark.parametrize(("bits", "m0"), [(1, 0.0), (2, 0.2), (2, -0.2)])
def test_a_wide_start_in_an_outermost_cell_saturates(bits, m0):
    # the grid is 0.1 against a start of 1: what the estimate leaves out is of this order
    p = Problem(Staircase(bits, 0.1), lr=0.1, initial_overlap=m0)
    e = estimate(p, 300.0)
    assert e.mechanism == "saturation"
    assert plateau(exact(p, np.linspace(0, 300, 1601))).l10 == pytest.approx(e.l10, rel=0.1)


DEAD_ZONE = {"lr": 0.02, "initial_variance": 0.01}


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (Problem(Staircase(3, 4.0, "tread"), method="clipped_ste", clip=0.3, **DEAD_ZONE), "method 'clipped_ste'"),
        (Problem(Staircase(3, 4.0, "tread"), weight_decay=2.0, **DEAD_ZONE), "weight decay 2"),
        (Problem(Staircase(3, 4.0, "tread", temperature=1.0), **DEAD_ZONE), "temperature 1"),
    ],
)
def test_what_the_estimate_does_not_cover_has_a_reason_and_no_number(problem, shown):
    e = estimate(problem, 60.0)
    assert (e.mechanism, e.l10) == ("none", 0.0)
    assert shown in e.reason
