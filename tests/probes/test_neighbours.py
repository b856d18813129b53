"""The search for low-loss grid points: cases solved by exhaustion, every kind of grid, and real data."""

import itertools
import math

import pytest
import torch
from tests.cases import REPRESENTATIVES
from tests.probes.models import UNIT, Quadratic, normal, positive, row
from torch import nn

import stepwell as sw
from stepwell.probes.grid import grid


def walled(normal_, centre, half_width):
    """A flat basin |n . (w - c)| <= r between walls of slope 1."""
    n, c = torch.tensor(normal_, dtype=torch.float64), torch.tensor(centre, dtype=torch.float64)
    return lambda m: ((n @ (m.weight[0] - c)).abs() - half_width).clamp(min=0).sum()


@pytest.mark.parametrize("centre", [[0.42, 0.36], [0.40, 0.40]], ids=["A", "A-tie"])
def test_finds_the_neighbour_that_rounding_misses(centre):
    # Rounding to (0, 0) is out by .55 or .57 against a half width of .3; (1, 0) and (0, 1) are inside, where the loss is 0.
    side = 0.5**0.5
    found = sw.probes.neighbours(row(centre), walled([side, side], centre, 0.3), around=UNIT, tolerance=0.01)
    assert found.before == pytest.approx(side * sum(centre) - 0.3)
    assert (found.loss, found.within) == (0.0, True)
    assert sorted(found.found["weight"].codes[0].tolist()) == [0, 1]
    assert found.history == (found.before, 0.0)
    assert found.changed == 0.5
    assert str(found).startswith("found a grid point within tolerance in")


def test_where_no_grid_point_is_it_says_not_found():
    # the wall stands across the first coordinate, 0.5 away from every integer, and the basin is 0.3 wide
    found = sw.probes.neighbours(row([0.5, 0.1]), walled([1.0, 0.0], [0.5, 0.1], 0.3), around=UNIT, tolerance=0.1)
    assert (found.loss, found.within, found.changed) == (pytest.approx(0.2), False, 0.0)
    assert "found no grid point" in str(found)


@pytest.mark.parametrize("seed", range(6))
def test_result_lies_in_the_box_and_between_its_start_and_the_best_of_all(seed):
    size = 6
    centre = 2 * normal(size, seed=seed)
    loss = Quadratic(positive(size, seed), centre, offset=0.0)
    found = sw.probes.neighbours(row(centre), loss, around=UNIT)
    start = UNIT(centre)
    best = min(loss(row(start + torch.tensor(move))).item() for move in itertools.product((-1.0, 0.0, 1.0), repeat=size))
    assert best - 1e-12 <= found.loss <= found.before == pytest.approx(loss(row(start)).item())
    assert (found.found["weight"].decode() - start).abs().max() <= 1
    assert loss(row(found.found["weight"].decode()[0])).item() == pytest.approx(found.loss)
    assert all(later < earlier for earlier, later in itertools.pairwise(found.history))


@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_a_wrong_step_is_undone_on_every_kind_of_grid(quantizer):
    # A loss that is separate in every weight has its best grid point at the rounded weights. Knock one code in 20 to a neighbour
    # that is worse; the search has to come back, whatever the signs of scales, zero points and distances between values.
    model = nn.Linear(64, 8, bias=False).double()
    model.weight.data = normal(8, 64, seed=0)
    target = sw.probes.rounded(model, quantizer)["weight"]
    held, wanted = grid(target, model.weight.detach()), target.decode()
    index = held.indices(target)
    assert torch.equal(held.value(index), wanted)
    assert torch.equal(held.nearest(wanted), index)
    assert torch.equal(held.encode(index, target).codes, target.codes)
    knocked = torch.zeros_like(index)
    places = torch.arange(0, 512, 20)
    knocked.view(-1)[places] = torch.where(index.view(-1)[places] < held.top, 1, -1).to(index.dtype)
    start = held.encode(index + knocked, target)
    weights = torch.linspace(1, 2, 512, dtype=torch.float64).view(8, 64)  # no ties
    found = sw.probes.neighbours(
        model, lambda m: (weights * (m.weight - wanted).square()).sum(), around={"weight": start}, rounds=60, tolerance=1e-9
    )
    assert found.loss <= 1e-20 < found.before
    assert torch.equal(found.found["weight"].decode(), wanted)
    assert found.found["weight"].quantizer == quantizer


def test_corners_are_the_two_values_around_every_weight():
    centre = 2 * normal(40, seed=3)
    loss = Quadratic(positive(40, 1), 3 * normal(40, seed=4))  # pulls far away
    box, corners = (sw.probes.neighbours(row(centre), loss, around=UNIT, reach=reach) for reach in ("box", "corners"))
    away = (corners.found["weight"].decode()[0] - centre).abs()
    assert away.max() < 1
    assert corners.loss < corners.before
    assert (box.found["weight"].decode()[0] - UNIT(centre)).abs().max() == 1
    assert box.loss < corners.loss


def test_codes_stay_in_the_range_of_the_format():
    ternary = sw.intn(2, block=None, scale=1.0)
    model = row([0.9, -0.8, 0.7, 0.2])
    found = sw.probes.neighbours(model, lambda m: -m.weight.sum() + 10, around=ternary)
    assert found.found["weight"].codes.tolist() == [[1, 0, 1, 1]]  # -1 may go up one step only, and 1 none


def test_held_out_data_are_judged_at_both_ends_and_not_searched():
    loss = Quadratic(torch.eye(2), torch.tensor([1.0, 1.0]), offset=0.0)
    other = Quadratic(torch.eye(2), torch.tensor([0.0, 0.0]), offset=0.0)
    found = sw.probes.neighbours(row([0.4, 0.4]), loss, around=UNIT, held_out=other)
    assert (found.loss, found.held_out_before, found.held_out) == (0.0, 0.0, 1.0)
    assert found.cost.forward == loss.calls + other.calls
    assert other.calls == 2
    alone = sw.probes.neighbours(row([0.4, 0.4]), loss, around=UNIT)
    assert math.isnan(alone.held_out)


def test_no_rounds_is_no_search():
    found = sw.probes.neighbours(row([0.4, 0.4]), Quadratic(torch.eye(2), torch.ones(2)), around=UNIT, rounds=0)
    assert (found.loss, found.changed, found.cost.backward) == (found.before, 0.0, 0)


def test_options_out_of_range_are_refused():
    model, loss = row([0.4]), Quadratic(torch.eye(1), torch.zeros(1))
    with pytest.raises(ValueError, match="`reach` must be 'box' or 'corners'"):
        sw.probes.neighbours(model, loss, around=UNIT, reach="two")
    with pytest.raises(ValueError, match="`rounds`"):
        sw.probes.neighbours(model, loss, around=UNIT, rounds=-1)
    with pytest.raises(TypeError, match="`around` must be encoded"):
        sw.probes.neighbours(model, loss, around={"weight": torch.zeros(1, 1)})
    assert loss.calls == 0
