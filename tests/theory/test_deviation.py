"""The two limits of the fixed point, against the fixed point."""

import numpy as np
import pytest

from stepwell.theory import Problem, Staircase, high_resolution, low_noise, ptq, rounded, stationary

INPUTS = Staircase(3, 2.0)


@pytest.mark.parametrize("omega", [1.05, 1.2, 2.0, 3.3])
@pytest.mark.parametrize("limit", ["exact", "closure"])
def test_low_noise(omega, limit):
    p = Problem(Staircase(2, omega), INPUTS, lr=1e-3)
    assert stationary(p, limit=limit).error == pytest.approx(low_noise(p), abs=1e-4)


def test_low_noise_with_a_gaussian_teacher():
    p = Problem(Staircase(3, 2.0), lr=1e-3, teacher="gauss")
    assert stationary(p).error == pytest.approx(low_noise(p), abs=2e-4)  # 360 nodes against 4000


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_high_resolution(bits):
    p = Problem(Staircase(bits, 3.0), INPUTS, lr=0.5, label_noise=0.5)
    plain = stationary(Problem(None, INPUTS, lr=0.5, label_noise=0.5)).error
    gain = high_resolution(p) - plain
    assert stationary(p).error - plain == pytest.approx(gain, rel=0.02)  # up to saturation: 3 is many standard deviations away


def test_high_resolution_published_values():
    for bits, want in ((4, 0.04562), (6, 0.04189)):
        assert high_resolution(Problem(Staircase(bits, 2.0), lr=0.5, label_noise=0.5)) == pytest.approx(want, abs=1e-5)


def test_both_deviations_fall_as_four_to_the_bits():
    scaled = [high_resolution(Problem(Staircase(b, 2.0, "mid"), lr=0.5)) * 4**b for b in (5, 9)]
    assert scaled[0] == pytest.approx(scaled[1])
    means = [np.mean([low_noise(Problem(Staircase(b, omega, "mid"))) for omega in np.linspace(2, 2.5, 400)]) * 4**b for b in (6, 9)]
    assert means[0] == pytest.approx(means[1], rel=0.05)  # f is spread evenly over many cells


@pytest.mark.parametrize("omega", np.linspace(1.1, 3, 7))
def test_ste_never_ends_below_plain_rounding(omega):
    p = Problem(Staircase(2, omega), INPUTS)
    assert rounded(p) <= low_noise(p)
    # plain rounding at t -> infinity and lr -> 0
    still = Problem(Staircase(2, omega), INPUTS, method="ptq", lr=1e-4)
    assert rounded(p) == pytest.approx(ptq(still, [1e6]).error[0], abs=1e-3)


def test_formulas_say_where_they_do_not_hold():
    with pytest.raises(ValueError, match=r"below the linear threshold 2.*got lr=2\.5"):
        high_resolution(Problem(Staircase(4, 2.0), lr=2.5))
    with pytest.raises(ValueError, match="equal steps"):
        high_resolution(Problem(Staircase(2, 2.0, "levels", values=(-2.0, 0.1, 2.0))))
    with pytest.raises(ValueError, match="hard quantized weights"):
        low_noise(Problem(None))


@pytest.mark.parametrize("formula", [low_noise, rounded, high_resolution])
def test_formulas_refuse_decay(formula):
    # decay moves the target: 2-bit STE with lam = .5 ends at 1/18 and not at the 1/6 of the formula
    with pytest.raises(ValueError, match=r"`weight_decay`.*0\.5"):
        formula(Problem(Staircase(2, 2.0), weight_decay=0.5))


@pytest.mark.parametrize("method", ["lotion", "ptq", "clipped_ste"])
@pytest.mark.parametrize("formula", [low_noise, high_resolution])
def test_formulas_of_ste_refuse_other_methods(formula, method):
    with pytest.raises(ValueError, match=f"method 'ste': got '{method}'"):
        formula(Problem(Staircase(2, 2.0), method=method))
