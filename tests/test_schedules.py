"""Schedules: their ends, what they do between, and what they refuse."""

import math

import pytest

from stepwell import schedules
from stepwell.schedules import constant, cosine, exponential, linear, scheduled, sigmoid, value_at

KINDS = {"linear": linear, "cosine": cosine, "exponential": exponential, "sigmoid": sigmoid}


@pytest.mark.parametrize("ends", [(1.0, 0.25), (0.5, 3.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_goes_from_start_to_end_and_stays(kind, ends):
    schedule = KINDS[kind](*ends, steps=8, begin=3)
    values = [schedule(step) for step in range(20)]
    assert values[:4] == pytest.approx([ends[0]] * 4, rel=1e-15)
    assert values[11:] == pytest.approx([ends[1]] * 9, rel=1e-15)
    ordered = sorted(values, reverse=ends[0] > ends[1])
    assert values == ordered
    assert len(set(values[3:12])) == 9


def test_middle_of_each_kind():
    assert linear(0, 1, steps=4)(2) == 0.5
    assert cosine(0, 1, steps=4)(1) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert exponential(1, 100, steps=4)(2) == pytest.approx(10)
    assert constant(0.3)(99) == 0.3


def test_sigmoid_is_parqs_curve_where_its_centre_is_the_middle():
    """PARQ: 1 / (1 + exp(s (t - 1/2))), shifted and scaled so that it is 1 at the start and 0 at the end."""
    steepness, steps = 10.0, 40
    one, two = 1 / (1 + math.exp(-steepness / 2)), 1 / (1 + math.exp(steepness / 2))
    for step in range(steps + 1):
        expected = (1 / (1 + math.exp(steepness * (step / steps - 0.5))) - two) / (one - two)
        assert sigmoid(1, 0, steps=steps)(step) == pytest.approx(expected, abs=1e-15)
    late = sigmoid(1, 0, steps=steps, center=0.9)
    assert (late(0), late(steps)) == (1, 0)
    assert late(20) > 0.95


def test_exact_ends():
    """Rounding to nearest begins exactly where the slope is 0."""
    for kind in (linear, cosine, sigmoid):
        for steps in (1, 3, 7, 200, 999):
            assert kind(1, 0, steps=steps)(steps) == 0
            assert kind(1, 0, steps=steps)(0) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(-1, 0, steps=4), "0 or more: got -1"),
        (lambda: cosine(0, math.inf, steps=4), "finite numbers.*inf"),
        (lambda: linear(0, True, steps=4), "got True"),
        (lambda: exponential(0, 1, steps=4), "`start` and `end`.*positive"),
        (lambda: linear(0, 1, steps=0), "`steps`"),
        (lambda: linear(0, 1, steps=2.5), "`steps`"),
        (lambda: linear(0, 1, steps=2, begin=-1), "`begin`"),
        (lambda: sigmoid(1, 0, steps=2, steepness=0), "`steepness`"),
        (lambda: sigmoid(1, 0, steps=2, center=1.5), "`center`"),
        (lambda: constant(math.nan), "finite numbers"),
        (lambda: scheduled("slope", -0.5), "`slope`"),
        (lambda: value_at("slope", lambda step: -step, 3), "`slope`.*at step 3"),
    ],
)
def test_bad_schedules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedule_is_a_number_or_a_function():
    assert scheduled("slope", 0.5)(7) == 0.5
    assert scheduled("slope", schedules.linear(0, 1, steps=2))(1) == 0.5
    with pytest.raises(TypeError, match="`slope` must be a number or a function"):
        scheduled("slope", "fast")
