"""Closed-form Gaussian integrals against numerical integration."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from tests.reference.closure import mean

from stepwell.theory import Staircase
from stepwell.theory.gaussian import bivariate, levels, moments

UNEVEN = Staircase(3, 2.0, "levels", values=(-2.0, -0.9, -0.2, 0.1, 1.4, 1.9))


@pytest.mark.parametrize(
    "staircase", [Staircase(1, 1.0), Staircase(2, 2.0), Staircase(3, 1.5, "tread"), Staircase(3, 2.0, "mid"), UNEVEN], ids=str
)
@pytest.mark.parametrize(("mu", "s"), [(0.0, 1.0), (0.7, 0.2), (-3.0, 0.5), (0.6667, 0.01)])
@pytest.mark.parametrize("temperature", [0.0, 0.15])
def test_moments_are_the_integrals(staircase, mu, s, temperature):
    psi = Staircase(staircase.bits, staircase.range, staircase.kind, temperature, staircase.values)
    got = moments(psi, mu, s)
    expect = lambda f: mean(f, mu, s, tuple(psi.thresholds))  # noqa: E731
    # quad is asked for 1e-11
    assert got.mean == pytest.approx(expect(lambda w: float(psi(w))), abs=1e-9)
    assert got.square == pytest.approx(expect(lambda w: float(psi(w)) ** 2), abs=1e-9)
    assert got.product == pytest.approx(expect(lambda w: w * float(psi(w))), abs=1e-9)


@pytest.mark.parametrize("staircase", [Staircase(3, 1.5), Staircase(16, 2.0), Staircase(2, 1.0, temperature=0.2)], ids=str)
def test_the_short_form_agrees_with_all_moments(staircase):
    mu, s = np.linspace(-1, 2, 50), np.geomspace(1e-12, 2, 50)
    g = moments(staircase, mu, s)
    np.testing.assert_allclose(levels(staircase, mu, s), (g.mean, g.square), atol=1e-12)


def test_slope_is_the_derivative_of_the_mean():
    staircase, step = Staircase(3, 1.5, temperature=0.2), 1e-5
    numeric = (moments(staircase, 0.3 + step, 0.4).mean - moments(staircase, 0.3 - step, 0.4).mean) / (2 * step)
    assert moments(staircase, 0.3, 0.4).slope == pytest.approx(numeric, abs=1e-8)  # central difference: step^2 and rounding / step


def test_the_limit_of_zero_temperature():
    # E[psi_T^2] - E[psi^2] = -(T / sqrt(pi)) sum step^2 n(z) / s + O(T^2)
    hard = moments(Staircase(3, 2.0), 0.3, 0.5).square
    gaps = [hard - moments(Staircase(3, 2.0, temperature=T), 0.3, 0.5).square for T in (1e-2, 1e-3, 1e-4)]
    assert np.log10(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.05)
    assert gaps[2] == pytest.approx(gaps[1] / 10, rel=0.01)


@pytest.mark.parametrize("r", [0.0, 0.3, 0.97, 0.999999])
def test_bivariate_probabilities_against_scipy(r):
    h, k = np.array([0.0, 0.5, -1.2, 2.0, 0.0]), np.array([0.0, -0.5, -1.0, 1.9, 1.0])
    want = [multivariate_normal.cdf([x, y], [0, 0], [[1, r], [r, 1]], abseps=1e-10, releps=1e-10) for x, y in zip(h, k, strict=True)]
    np.testing.assert_allclose(bivariate(h, k, r), want, atol=1e-7)  # scipy's integrator claims 1e-8 and less


@pytest.mark.parametrize(
    ("inputs", "a", "rho"),
    [(Staircase(2, 2.0), 0.969283, 1.093058), (Staircase(4, 2.0), 0.95514, 0.92747), (Staircase(2, 0.5), 0.38457, 0.19197)],
    ids=str,
)
def test_input_coefficients_have_their_published_values(inputs, a, rho):
    got = moments(inputs, 0.0, 1.0)
    assert (got.product, got.square) == (pytest.approx(a, abs=6e-6), pytest.approx(rho, abs=6e-6))  # five digits


def test_many_levels_and_many_points_do_not_need_one_big_array():
    fine, mu = Staircase(16, 4.0), np.linspace(-1, 1, 200)
    # Delta = 1.2e-4 and no saturation at 4: a fine grid only adds Delta^2 / 12 to the second moment
    np.testing.assert_allclose(moments(fine, mu, 0.3).square, mu**2 + 0.09 + fine.spacing**2 / 12, atol=1e-10)
