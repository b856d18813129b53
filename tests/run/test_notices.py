"""What a run says once: grids that saturate, with the bias that was measured, and penalties beyond their bound, with the number."""

import re
import warnings

import pytest
import torch
from tests.cases import METHODS, gaussian
from tests.run.training import batches, network, train

import stepwell as sw

FULL = sw.intn(3, block=16, levels="full")


def caught(method, *, steps=0, optimizer=torch.optim.AdamW, model=None):
    """Return the warnings of a run, from `attach` on."""
    model = network() if model is None else model
    made = optimizer(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run = sw.attach(model, method, made)
        train(model, made, batches(steps))
    run.detach()
    return found


@pytest.mark.parametrize("name", ["lotion", "ste + lotion", "coupled", "sampled", "prox", "held scales, lotion"])
def test_saturating_grid_says_so_once_with_its_bias(name):
    layer = torch.nn.Linear(16, 4, bias=False)
    layer.weight.data.zero_()
    layer.weight.data[:, 0], layer.weight.data[:, 1] = -4.0, 4.0  # codes -4 and 3: the positive one is a quarter beyond the last code
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sw.attach(layer, METHODS[name](FULL), torch.optim.AdamW(layer.parameters()))
    (only,) = found
    assert only.filename == __file__
    text = str(only.message)
    assert "int3/full block 16" in text
    assert "'weight'" in text
    if "held" not in name:
        assert "saturates: 4 of 64 weights" in text
        assert "smaller by 25.00% on average" in text


def test_saturation_is_what_randomized_rounding_does():
    """The number of the warning against two thousand draws."""
    layer = torch.nn.Linear(32, 64, bias=False)
    layer.weight.data = weight = gaussian(64, 32, seed=0)
    (found,) = caught(sw.lotion(sw.mxfp4(rule="floor"), loss_terms=1), model=layer)
    said = float(re.search(r"by ([\d.]+)% on average", str(found.message))[1]) / 100
    weight = weight.clone()
    quantizer = sw.mxfp4(rule="floor")
    outside = (weight - quantizer.bracket(weight).x).abs() > 1e-5
    mean = torch.stack([quantizer(weight, rounding=sw.stochastic(torch.Generator().manual_seed(k))) for k in range(200)]).mean(0)
    assert said == pytest.approx(((weight - mean).abs()[outside].sum() / weight.abs()[outside].sum()).item(), abs=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        sw.ste(FULL),
        sw.lsq(FULL),
        sw.learned(sw.lotion(FULL, loss_terms=64, forward="nearest")),
        sw.lotion(sw.int3(block=16), loss_terms=64),
        sw.lotion(sw.nvfp4(), loss_terms=64),
        METHODS["default"](FULL),
    ],
    ids=lambda method: f"{method.name}, {method.quantizer}",
)
def test_nothing_is_said_where_nothing_saturates_or_nothing_depends_on_it(method):
    assert not caught(method, steps=3)


@pytest.mark.parametrize(
    "make",
    [lambda s: sw.lotion(sw.int3(block=16), strength=s, loss_terms=64), lambda s: sw.coupled(sw.int3(block=16), strength=s, loss_terms=64)],
    ids=["lotion", "coupled"],
)
def test_penalty_beyond_its_bound_warns_once_with_number_and_remedy(make):
    """The number is the strength's multiple: ten times the strength, ten times the number."""
    said = []
    for strength in (1e5, 1e6):
        (only,) = caught(make(strength), steps=12)
        text = str(only.message)
        assert "exceeds its stability bound" in text
        assert "may be 2" in text
        assert "`strength`" in text
        said.append(float(re.search(r"gradient is ([\d.e+]+) or more", text)[1]))
    assert said[1] == pytest.approx(10 * said[0], rel=0.02)  # three digits
    assert not caught(make(1.0), steps=12)


def test_the_bound_is_checked_again_while_the_strength_grows():
    found = caught(sw.lotion(sw.int3(block=16), strength=sw.schedules.linear(0, 1e6, steps=5), loss_terms=64), steps=12)
    assert len(found) == 1


def test_proximal_steps_have_no_bound():
    assert not caught(sw.prox(sw.int3(block=16), strength=1e9, loss_terms=64), steps=12)
