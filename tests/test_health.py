"""Health: planted flips, oscillations, dead and clipped weights, and numbers that are none, are found and counted."""

import math

import pytest
import torch
from tests.cases import REPRESENTATIVES, gaussian
from torch import nn

import stepwell as sw
from stepwell.health import Health, Watch

FIXED = sw.intn(4, block=None, scale=1.0)  # codes are the rounded weights, -7..7


def looks(*weights):
    """Return the vitals of each look at weights `(1, n)` on the grid of whole numbers."""
    watch = Watch()
    return [watch.look(torch.tensor([weight]), FIXED.local()) for weight in weights]


def test_first_look_has_nothing_to_compare_with():
    (first,) = looks([1.0, 2.0])
    assert math.isnan(first.flips)
    assert math.isnan(first.oscillation)
    assert math.isnan(first.dead)


def test_flips_are_codes_that_changed():
    _, second = looks([1.0, 2.0, 3.0, -4.0], [1.4, 2.6, 3.0, 4.0])
    assert second.flips == 0.5  # 2 -> 3 and -4 -> 4; 1.4 still rounds to 1


def test_oscillation_is_a_flip_back():
    """The first weight comes back, the second goes on, the third came back one look late, the fourth stays."""
    *_, third, fourth = looks([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 1.0], [1.0, 3.0, 2.0, 1.0], [1.0, 3.0, 1.0, 1.0])
    assert third.oscillation == 0.25
    assert third.flips == 0.5
    assert fourth.oscillation == 0.0
    assert fourth.flips == 0.25


def test_dead_weights_never_changed_their_code():
    _, second, third = looks([1.0, 2.0, 3.0, 4.0], [1.3, 2.0, 3.0, 5.0], [1.0, 2.0, 4.0, 4.0])
    assert second.dead == 0.75
    assert third.dead == 0.5  # the fourth is back at its first code, and was away


def test_clipped_weights_lie_beyond_the_grid():
    (vitals,) = looks([8.0, -7.5, 7.0, 7.00001, 0.0])
    assert vitals.clipped == pytest.approx(0.4)


def test_distance_is_in_units_of_the_scale():
    (vitals,) = looks([1.25, -2.5, 3.0, 9.0])
    assert vitals.distance == pytest.approx((0.25 + 0.5 + 0 + 2) / 4)
    scaled = Watch().look(torch.tensor([[0.0125, -0.025, 0.03, 0.09]]), sw.intn(4, block=None, scale=0.01).local())
    assert scaled.distance == pytest.approx(vitals.distance, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_found_and_named(value):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.attach(model, sw.ste(sw.int4()), optimizer)
    healthy = run.health()
    assert healthy.sick == ()
    assert healthy.total.finite
    model[1].weight.grad = torch.zeros(32, 32)
    model[1].weight.grad[3, 3] = value
    optimizer.step()
    found = run.health()
    assert found.sick == ("1.weight",)
    assert not found.total.finite
    (line,) = [line for line in str(found).splitlines() if line.startswith("1.weight")]
    assert "NOT FINITE" in line


def test_the_table_says_what_needs_another_look():
    watch, model = Watch(), "layer.weight"
    tables = []
    for weight in ([1.0, 2.0], [2.0, 2.0], [1.0, 2.0]):
        tables.append(str(Health({model: watch.look(torch.tensor([weight]), FIXED.local())})).splitlines())
    cells = [[line.split()[2:5] for line in table[1:3]] for table in tables]  # flips, oscillation, dead; of the weight and of all
    assert cells == [[["-", "-", "-"]] * 2, [["0.5000", "-", "0.5000"]] * 2, [["0.5000", "0.5000", "0.5000"]] * 2]
    assert "nan" not in str(tables)
    assert "flips and dead need a second look, oscillation a third" in tables[0][-1]
    assert "oscillation needs a third look" in tables[1][-1]
    assert [len(table) for table in tables] == [4, 4, 3]


def test_total_weighs_by_elements():
    rows = {"a": looks([1.0, 2.0, 3.0], [2.0, 2.0, 3.0])[1], "b": looks([1.0], [2.0])[1]}
    total = Health(rows).total
    assert total.elements == 4
    assert total.flips == pytest.approx(0.5)
    assert total.dead == pytest.approx(0.5)


def test_run_counts_flips_between_looks():
    """Two steps of a whole code each on planted elements: the counts are those, whatever happened between the looks."""
    model = nn.Linear(16, 2, bias=False)
    model.weight.data = torch.arange(32.0).reshape(2, 16) % 7 - 3
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = sw.attach(model, sw.ste(FIXED), optimizer)
    run.health()
    for sign in (1.0, -1.0):
        model.weight.grad = torch.zeros(2, 16)
        model.weight.grad[0, :4] = sign
        if sign > 0:
            model.weight.grad[1, 0] = 1.0
        optimizer.step()
    vitals = run.health().parameters["weight"]
    assert vitals.flips == 1 / 32  # four went and came back unseen, one stayed away
    assert vitals.dead == 31 / 32
    for sign in (1.0, -1.0):
        model.weight.grad = torch.zeros(2, 16)
        model.weight.grad[0, :4] = sign
        optimizer.step()
        last = run.health().parameters["weight"]
    assert last.oscillation == 4 / 32
    assert last.dead == 27 / 32


@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_rounded_weights_are_at_no_distance_under_their_own_scales(quantizer):
    """Where the grid's own scales are held, weights on the grid lie on it to rounding error of the division: 4 ulp of the largest code."""
    weight = gaussian(8, 128, seed=0)
    blocks, fit, _ = quantizer.prepare(weight)
    vitals = Watch().look(quantizer.snap(blocks, fit), quantizer.local(), fit)
    widest = max(abs(value) for value in quantizer.format.values)
    loose = 2.0**-8 * widest if quantizer.compute else 4 * 2.0**-23 * widest  # `compute` rounds the weights to that dtype
    assert vitals.distance <= loose
    assert vitals.finite
