"""A problem refuses what has no answer, showing the value and the valid range."""

import numpy as np
import pytest

from stepwell.theory import Problem, Staircase
from stepwell.theory.problem import check_times

TWO = Staircase(2, 2.0)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"lr": -0.1}, "`lr` .*from 1e-06 to.*got -0.1"),
        ({"lr": 0.0}, "`lr` .*from 1e-06 to.*got 0.0"),
        ({"lr": NAN}, "`lr` .*got nan"),
        ({"lr": INF}, "`lr` .*got inf"),
        ({"label_noise": -1.0}, "`label_noise` .*from 0 to 1e.*got -1.0"),
        ({"label_noise": INF}, "`label_noise` .*got inf"),
        ({"weight_decay": -0.5}, "`weight_decay` .*from 0 to 1e.*got -0.5"),
        ({"initial_variance": -0.01}, "`initial_variance` .*from 0 to 1e.*got -0.01"),
        ({"initial_variance": NAN}, "`initial_variance` .*got nan"),
        ({"teacher_power": 0.0}, "`teacher_power` .*from 1e-06 to.*got 0.0"),
        ({"initial_overlap": 1e6}, "`initial_overlap` .*from -100 to 100.*got 1000000.0"),
        ({"initial_overlap": NAN}, "`initial_overlap` .*got nan"),
        ({"strength": -1.0, "method": "lotion"}, "`strength` .*from 0 to 1e.*got -1.0"),
        ({"clip": 0.0, "method": "clipped_ste"}, "`clip` .*from 1e-06 to.*got 0.0"),
        ({"lr": 1e-300}, "`lr` .*from 1e-06 to 1000: got 1e-300"),
        ({"label_noise": 1e200}, "`label_noise` .*from 0 to 1e.06: got 1e.200"),
        ({"weight_decay": 1e200}, "`weight_decay` .*from 0 to 1e.06: got 1e.200"),
        ({"initial_variance": 1e200}, "`initial_variance` .*from 0 to 1e.12: got 1e.200"),
        ({"teacher_power": 1e200}, "`teacher_power` .*from 1e-06 to 1e.06: got 1e.200"),
        ({"clip": 1.0}, "`clip` must be None for method 'ste': got 1.0"),
        ({"method": "qat"}, "`method` must be .*got 'qat'"),
        ({"teacher": "two"}, "`teacher` must be .*got 'two'"),
        ({"weights": None, "method": "lotion"}, "`weights` must be a Staircase"),
        ({"weights": Staircase(2, 2.0, temperature=0.1), "method": "lotion"}, "temperature 0"),
        ({"weights": Staircase(12, 2.0, temperature=0.1)}, "at most 256 levels: got 4096"),
        ({"inputs": Staircase(2, 2.0, "levels", values=(-2.0, -1.0, 0.0, 1.0))}, r"mean 0 .*got E\[phi\] = -0.06681"),
    ],
)
def test_bad_input_is_refused(arguments, shown):
    with pytest.raises(ValueError, match=shown):
        Problem(**{"weights": TWO, **arguments})


def test_a_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"`weights` must be a Staircase.*got 'int4'"):
        Problem(weights="int4")
    with pytest.raises(TypeError, match=r"`lr` must be a number: got '0\.1'"):
        Problem(weights=TWO, lr="0.1")


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ([0, 1, 1], "1 followed by 1"),
        ([0, 2, 1], "2 followed by 1"),
        ([-1, 2], "from -1 to 2"),
        ([0, NAN], "finite"),
        ([0, INF], "finite"),
        ([], "non-empty"),
        ([[0, 1]], "one-dimensional"),
    ],
)
def test_bad_times_are_refused(times, shown):
    with pytest.raises(ValueError, match=shown):
        check_times(times)


def test_without_input_quantizer_both_coefficients_are_one():
    p = Problem(weights=TWO)
    assert (p.gain, p.power, p.target) == (1.0, 1.0, 1.0)


def test_a_start_with_overlap_is_valid_whatever_its_variance():
    for overlap in (-3.0, 0.5, 3.0):
        assert Problem(weights=TWO, initial_overlap=overlap, initial_variance=0.0).initial_overlap == overlap


def test_the_clip_range_is_that_of_the_weights_unless_told():
    assert Problem(TWO, method="clipped_ste").clip_range == 2.0
    assert Problem(TWO, method="clipped_ste", clip=1.1).clip_range == 1.1
    assert np.isinf(Problem(TWO).clip_range)
