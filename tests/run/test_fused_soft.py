"""The soft staircase's kernel against the eager pass in float64, and a run on it: what it shows, it finds again."""

import pytest
import torch
from tests.cases import METHODS, gaussian
from tests.run.test_fused import awkward, managed
from tests.run.training import batches, latents, network, same, train, weights

import stepwell as sw
from stepwell.run import fused, fused_held, passes
from stepwell.run.told import Told

pytest.importorskip("numba")

GRIDS = [
    sw.intn(4, block=32, levels="full"),
    sw.intn(2, block=16, levels="mid"),
    sw.intn(3, block="channel", levels="mid"),
    sw.intn(3, block=20, levels="full"),
    sw.int3(block=16),
    sw.int2(block=16),
    sw.int8(block=5),
    sw.ternary(block=32),
]
# Of a grid step: 3e-7 from reading the table between its nodes. Float32 knows a weight's place only to an ulp of its code, and the
# staircase is as steep as .4 / T there: that is added below.
TABLE = 1e-6


def tell(one, temperature, fit):
    return Told(one.grid, 0, 1.0, 1.0, fit, {}, 0, one.name, 0, {"temperature": temperature})


@pytest.mark.parametrize("held", [None, 0.8], ids=["absmax scales", "scales that saturate"])
@pytest.mark.parametrize("temperature", [0.9, 0.5, 0.3, 0.1, 0.08, 0.02, 0.004, 0.0])
@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_kernel_is_the_eager_pass(quantizer, temperature, held):
    weight = awkward(24, 160)
    one = managed(weight, sw.soft(quantizer, temperature=temperature))
    fit = one.grid.fit(one.blocks(one.weight))
    fit = fit if held is None else fit._replace(scale=fit.scale * held)
    told = tell(one, temperature, None if held is None else fit)
    latent = torch.empty_like(one.weight)
    assert fused_held.has(passes.deploy, one)
    fused.run(passes.deploy, one, told, [one.weight, latent])
    assert torch.equal(latent, weight)
    shown = torch.empty_like(weight)
    fused.run(passes.show, one, told, [shown, latent])
    assert torch.equal(shown, one.weight)  # what a run compares by
    if temperature == 0:
        assert torch.equal(shown, one.unblock(one.grid.snap(one.blocks(weight), fit)))
        return
    exact = managed(weight.double(), one.method)
    double = fit._replace(scale=fit.scale.double())
    passes.piecewise(passes.deploy, exact, told._replace(fit=double), [exact.weight, torch.empty_like(exact.weight)])
    step = one.unblock(fit.scale.abs().expand_as(one.blocks(weight)))
    place = 2**-23 * max(-quantizer.format.low, quantizer.format.high) * (1 + 0.4 / min(temperature, 0.5))
    assert ((shown.double() - exact.weight).abs() <= (TABLE + 2 * place) * step + 1e-44).all()  # subnormals have no more digits
    assert not torch.equal(shown, quantizer(weight)) or temperature < 0.02


def test_what_is_not_finite_stays_visible():
    weight = gaussian(4, 64, seed=0)
    weight[1, 7], weight[2, 7] = torch.nan, torch.inf
    one = managed(weight, sw.soft(sw.int4(), temperature=0.3))
    told = tell(one, 0.3, one.grid.fit(one.blocks(gaussian(4, 64, seed=0))))
    fused.run(passes.deploy, one, told, [one.weight, torch.empty_like(weight)])
    assert one.weight[1, 7].isnan()
    assert one.weight.isnan().sum() == 1
    assert one.weight[2, 7] == 7 * told.fit.scale[4]  # the block of the third row's first half


def trained(*, compile=None):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, METHODS["soft"](sw.int3(block=16)), optimizer, compile=compile)
    train(model, optimizer, batches(6))
    return model, run


@pytest.mark.filterwarnings("error")  # a run that does not find again what it showed takes it for an outside write, and says so
def test_training_with_the_kernel_equals_training_without(monkeypatch):
    """1e-6 of a step of .1 in what the forward pass sees is 1e-7 in a gradient, which Adam's root multiplies by a few times the rate."""
    monkeypatch.setattr(fused, "PAYS", 1)
    model, run = trained()
    assert "numba path" in repr(run)
    run.health()
    shown = weights(model)
    other, eager = trained(compile=False)
    found, expected = latents(run, model), latents(eager, other)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-6)
    assert same(weights(model), shown)
