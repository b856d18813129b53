"""Rounding picks an end of the bracket: the closer one, or one drawn with the right odds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import seeded

from stepwell.rounding import Bracket, nearest, pick, stochastic, variance


def cell(lower: float, x: float, upper: float, even: bool | None = None) -> Bracket:
    parts = (torch.tensor([value], dtype=torch.float32) for value in (lower, x, upper))
    return Bracket(*parts, None if even is None else torch.tensor([even]))


def test_nearest_takes_the_closer_end_and_the_even_code_on_ties():
    assert nearest(cell(1, 1.4, 2)) == 1
    assert nearest(cell(1, 1.6, 2)) == 2
    assert nearest(cell(1, 1.5, 2, even=True)) == 2
    assert nearest(cell(1, 1.5, 2, even=False)) == 1
    assert nearest(cell(-0.5, -0.25, 0, even=True)) == 0


@given(share=st.integers(0, 256), lower=st.sampled_from([-3.0, 0.0, 0.5]), gap=st.sampled_from([0.25, 1.0, 96.0]))
def test_the_upper_end_is_picked_by_exactly_its_share_of_the_draws(share, lower, gap):
    uniform = torch.arange(256) / 256  # every draw once, so frequencies are probabilities
    x = torch.full((256,), lower + gap * share / 256)
    drawn = pick(Bracket(torch.full_like(x, lower), x, torch.full_like(x, lower + gap)), uniform)
    assert int((drawn == lower + gap).sum()) == share


@given(st.floats(2.0**-60, 2.0**60, width=32), st.floats(-100, 100, width=32))
def test_a_weight_on_an_end_stays_there_under_every_draw(gap, lower):
    low = torch.tensor(lower)
    high = low + gap
    draws = torch.tensor([0.0, 0.5, 1 - 2**-24])  # 1 - 2**-24 is the largest float32 draw
    assert bool((pick(Bracket(low, low, high), draws) == low).all())
    if high > low:
        assert bool((pick(Bracket(low, high, high), draws) == high).all())


def test_draws_come_from_the_generator_that_is_given():
    bracket = Bracket(torch.zeros(64), torch.full((64,), 0.5), torch.ones(64))
    before = torch.random.get_rng_state()
    first, again, other = (stochastic(seeded(seed))(bracket) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_variance_is_that_of_two_points(share):
    lower, gap = -1.5, 0.5
    found = variance(cell(lower, lower + gap * share, lower + gap))
    assert float(found) == pytest.approx(gap**2 * share * (1 - share), abs=1e-7)  # p (1 - p) gap², float32
