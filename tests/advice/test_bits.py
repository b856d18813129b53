"""Bits per layer: the program against all choices, what is promised of the joint loss, and what is refused."""

import copy
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import stepwell as sw
from stepwell.advice.allocation import fewest_bits, least_increase, stored_bits, total
from stepwell.advice.bits import AFTER_TRAINING, bits_per_layer

GRIDS = [sw.intn(bits, block="channel", scale="mse") for bits in (2, 3, 4, 6, 8)]


def table(layers, grids, seed):
    rng = np.random.default_rng(seed)
    bits = np.outer(rng.integers(1, 50, layers), np.arange(2, 2 + grids)).astype(float)
    increases = rng.exponential(1, (layers, 1)) * 4.0 ** -np.arange(grids) * rng.uniform(0.5, 2, (layers, grids))
    return increases, bits


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_trying_everything_finds(seed):
    increases, bits = table(5, 4, seed)
    increases[0, 0] = math.inf
    choices = list(itertools.product(range(4), repeat=5))
    aim, budget = float(np.median(increases[1:])), float(bits.mean() * 5)
    allowed = [picks for picks in choices if total(increases, picks) <= aim]
    found = fewest_bits(increases, bits, aim)
    assert (found is None) == (not allowed)
    if found is not None:
        assert total(increases, found) <= aim * (1 + 1e-6)
        assert total(bits, found) == pytest.approx(min(total(bits, picks) for picks in allowed))
    cheap = [picks for picks in choices if total(bits, picks) <= budget]
    best = least_increase(increases, bits, budget)
    assert total(bits, best) <= budget * (1 + 1e-6)
    assert total(increases, best) == pytest.approx(min(total(increases, picks) for picks in cheap), rel=1e-6)


def test_there_may_be_no_solution():
    increases, bits = table(3, 2, 0)
    assert fewest_bits(increases, bits, float(increases.min()) / 10) is None
    assert least_increase(increases, bits, 1.0) is None


def test_stored_bits_are_those_of_the_saved_file(tmp_path):
    weight = torch.randn(16, 64)
    for grid in (sw.int4(block=32, scale_dtype="fp16"), sw.int8(block="channel"), sw.mxfp4()):
        sw.save(grid.encode(weight), tmp_path / "w.safetensors")
        encoded = sw.load(tmp_path / "w.safetensors")
        scale = {"fp16": 16, "fp32": 32, "e8m0": 8}[grid.scale_dtype]
        assert stored_bits(grid, (16, 64)) * weight.numel() == grid.format.bits * encoded.codes.numel() + scale * encoded.scales.numel()


@pytest.fixture(scope="module")
def learned():
    """A network of layers that differ in size and importance, and batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 4))
    x = torch.randn(256, 16)
    y = torch.stack([x[:, :4].prod(1), x[:, 4] * x[:, 5], x[:, 6].sin(), x[:, 7]], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        squared(model, (x, y)).backward()
        optimizer.step()
    return model, list(zip(x.split(32), y.split(32), strict=True))


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def ends(model, rounded, batches):
    """The mean increase over batches and the upper end of its 90 % interval, by Student's law."""
    with torch.no_grad():
        changes = [float(squared(rounded, batch) - squared(model, batch)) for batch in batches]
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return statistics.fmean(changes), stats.t.interval(0.9, len(changes) - 1, statistics.fmean(changes), error)[1]


def on(model, grids):
    """A copy of a model rounded to nearest."""
    rounded = copy.deepcopy(model)
    sw.ptq.rtn(rounded, grids)
    return rounded


@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.1])
def test_the_joint_loss_is_within_the_tolerance_with_no_more_bits_than_uniform(learned, tolerance):
    model, batches = learned
    found = bits_per_layer(model, squared, batches, grids=GRIDS, tolerance=tolerance)
    # the record's mapping is what rtn takes
    assert (found.measured, found.high) == pytest.approx(ends(model, on(model, found.quantizers), batches), abs=1e-6)
    assert found.within
    assert found.measured <= found.high <= tolerance
    assert found.bits <= found.uniform_bits
    # no smaller uniform grid would do, measured here on its own
    for grid in GRIDS:
        enough = ends(model, on(model, grid), batches)[1] <= tolerance
        assert not enough or grid.format.bits >= found.uniform.format.bits
    # and no single layer can be lowered to its next grid
    order = [grid.format.bits for grid in GRIDS]
    for name, grid in found.quantizers.items():
        place = order.index(grid.format.bits)
        if place:
            assert ends(model, on(model, {**found.quantizers, name: GRIDS[place - 1]}), batches)[1] > tolerance


def test_single_losses_are_those_of_one_rounded_layer(learned):
    model, batches = learned
    found = bits_per_layer(model, squared, batches, grids=GRIDS[:2], tolerance=1.0, skip=["6"])
    assert list(found.alone) == ["0.weight", "2.weight", "4.weight"]
    for name in found.alone:
        for k, grid in enumerate(GRIDS[:2]):
            assert found.alone[name][k] == pytest.approx(ends(model, on(model, {name: grid, "*": None}), batches)[0], abs=1e-6)


@pytest.mark.parametrize("budget", [3.0, 4.2, 5.5])
def test_a_budget_is_kept_and_no_affordable_uniform_grid_is_better(learned, budget):
    model, batches = learned
    overhead = 32 * (48 * 3 + 4) / (16 * 48 + 2 * 48 * 48 + 4 * 48)
    found = bits_per_layer(model, squared, batches, grids=GRIDS, bits_per_weight=budget + overhead)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in found.quantizers}
    spent = sum(stored_bits(grid, tuple(model.get_parameter(name).shape)) * sizes[name] for name, grid in found.quantizers.items())
    assert spent / sum(sizes.values()) == pytest.approx(found.bits)
    assert found.bits <= budget + overhead
    assert found.uniform.format.bits == max(grid.format.bits for grid in GRIDS if grid.format.bits <= budget)
    assert found.measured <= found.uniform_measured
    assert found.within


def test_a_tolerance_that_nothing_meets_is_said():
    layer, x = nn.Linear(8, 2, bias=False), torch.eye(8)
    loss = lambda model, x: (model(x) - target).square().mean()  # noqa: E731
    target = layer(x).detach()  # what is learned exactly is lost by any rounding
    found = bits_per_layer(layer, loss, [x], grids=GRIDS, tolerance=1e-12)
    assert not found.within
    assert found.uniform is None
    assert found.quantizers["weight"].format.bits == 8
    assert "more than was asked for" in str(found)


def test_the_model_is_left_as_found_and_passes_are_counted(learned):
    model, batches = learned
    before, calls, words = copy.deepcopy(model.state_dict()), 0, []

    def counted(model, batch):
        nonlocal calls
        calls += 1
        return squared(model, batch)

    found = bits_per_layer(model, counted, batches, grids=GRIDS, tolerance=0.02, on_step=words.append)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.cost == (calls // len(batches), 0)
    assert found.cost.forward == 2 + 4 * len(GRIDS) + found.evaluations == 2 + len(words)
    assert AFTER_TRAINING in str(found)
    assert "bits per weight" in str(found)


def test_the_choice_can_be_trained_on(learned):
    model, batches = copy.deepcopy(learned[0]), learned[1]
    found = bits_per_layer(model, squared, batches, grids=GRIDS, tolerance=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = sw.attach(model, {name: sw.ste(grid) for name, grid in found.quantizers.items()}, optimizer)
    squared(model, batches[0]).backward()
    optimizer.step()
    assert {name: one.quantizer for name, one in run.finalize().items()} == found.quantizers


REFUSED = {
    "no goal": ({}, ValueError, "either `tolerance` or `bits_per_weight`"),
    "two goals": ({"tolerance": 0.1, "bits_per_weight": 4.0}, ValueError, "either `tolerance` or `bits_per_weight`"),
    "tolerance": ({"tolerance": 0.0}, ValueError, "`tolerance` must be a positive number"),
    "budget": ({"bits_per_weight": -1.0}, ValueError, "`bits_per_weight` must be a positive number"),
    "no number": ({"bits_per_weight": True}, ValueError, "`bits_per_weight` must be a positive number"),
    "too small": ({"bits_per_weight": 1.5}, ValueError, "at least 6, .*got 1.5"),
    "one grid": ({"tolerance": 0.1, "grids": [sw.int4()]}, ValueError, "`grids` must hold two or more different grids"),
    "twice": ({"tolerance": 0.1, "grids": [GRIDS[0], GRIDS[0]]}, ValueError, "different grids"),
    "no list": ({"tolerance": 0.1, "grids": sw.int4()}, TypeError, "`grids` must be a list"),
    "no grid": ({"tolerance": 0.1, "grids": [sw.int4(), 3]}, TypeError, "`grids` must hold quantizers: got 3"),
    "block": ({"tolerance": 0.1, "grids": [sw.int4(block=7), sw.int3(block=7)]}, ValueError, "block"),
    "nothing left": ({"tolerance": 0.1, "skip": ["*"]}, ValueError, "nothing is selected"),
}


@pytest.mark.parametrize(("options", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_measured(options, kind, text):
    def never(model, batch):
        raise AssertionError("measured")

    with pytest.raises(kind, match=text):
        bits_per_layer(nn.Linear(8, 4), never, [torch.ones(2, 8)], **options)


def test_data_and_losses_are_checked():
    layer = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="`batches` must hold data"):
        bits_per_layer(layer, squared, [], tolerance=0.1)
    with pytest.raises(TypeError, match="`batches` must be an iterable"):
        bits_per_layer(layer, squared, torch.ones(2, 8), tolerance=0.1)
    with pytest.raises(TypeError, match="`loss` must be a function"):
        bits_per_layer(layer, 3.0, [torch.ones(2, 8)], tolerance=0.1)
    with pytest.raises(ValueError, match="finite"):
        bits_per_layer(layer, lambda model, x: model(x).sum() * math.inf, [torch.ones(2, 8)], tolerance=0.1)
