"""One-pass kernels against the eager passes, which are the reference.

What they decide (a code, what lies on the grid, on its edge) comes from the same quotient and is equal; so is the deployed weight, to the
last bit. A force is a product of four factors, each rounded once, and the scale's share a sum over a block in another order: relative
error `block * 2**-24` of the sum of the terms' magnitudes.
"""

import math
import sys

import pytest
import torch
from tests.cases import gaussian
from tests.run.training import batches, latents, network, same, train, weights

import stepwell as sw
from stepwell.blocks import to_blocks
from stepwell.run import fused, passes
from stepwell.run.managed import Managed
from stepwell.run.told import Told

pytest.importorskip("numba")

EPS = 2.0**-24
GRIDS = [sw.intn(bits, block=block) for bits in (2, 4, 8) for block in (5, 16, 32, "channel")] + [sw.ternary(block=32)]


def awkward(rows, columns, seed=0):
    """Return weights with a block of zeros, ties at the edge of the grid, blocks on the grid, negative zeros, tiny and large ones."""
    weight = gaussian(rows, columns, seed=seed)
    weight[0] = 0
    weight[1] = -weight[1].abs().max()
    weight[2] = sw.int3(block=None)(weight[2][None])[0]
    weight[3, ::2] = -0.0
    weight[4] *= 1e-30
    weight[5] *= 1e-42  # subnormal
    weight[6] *= 1e30
    return weight


def managed(weight, method):
    """Return a parameter under a method, as the run would hold it."""
    one = Managed("weight", torch.nn.Parameter(weight.clone()), method, method.quantizer, None)
    one.begun = True
    return one


def told(one, terms=1.0):
    return Told(one.grid, 0, terms, terms, None, {}, 0, one.name, 0, {})


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_deployed_weights_are_equal_to_the_last_bit(quantizer):
    found = []
    for run in (fused.run, passes.piecewise):
        one = managed(awkward(24, 160), sw.ste(quantizer))
        latent = torch.empty(24, 160)
        run(passes.deploy, one, told(one), [one.weight, latent])
        assert torch.equal(latent.view(torch.int32), awkward(24, 160).view(torch.int32))
        found.append(one.weight)
    assert torch.equal(*found)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(odd):
    found = []
    for run in (fused.run, passes.piecewise):
        weight = gaussian(4, 64, seed=0)
        weight[1, 7] = odd
        one = managed(weight, sw.ste(sw.int4(block=32)))
        run(passes.deploy, one, told(one), [one.weight, torch.empty(4, 64)])
        found.append(one.weight)
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert found[0].isnan().any()
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


@pytest.mark.parametrize("through_scale", [True, False], ids=["through scale", "scale detached"])
@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_pushed_moments_are_equal_but_for_the_order_of_sums(quantizer, through_scale):
    terms, beta, reach = 50.0, 0.9, passes.REACH
    weight, second = awkward(24, 160), gaussian(24, 160, seed=1).square() * 1e-3
    second[:, ::7] = 0  # weights without a gradient, where the bound is next to nothing
    factor, spread, floor = (torch.tensor(number, dtype=torch.float64) for number in ((1 - beta) / beta, reach**2 * 1.25, reach * 1e-8))
    start, found = gaussian(24, 160, seed=2) * 1e-3, []
    for run in (fused.run, passes.piecewise):
        one = managed(weight, sw.lotion(quantizer, loss_terms=1, through_scale=through_scale))
        moment = start.clone()
        run(passes.push, one, told(one, terms), [one.weight, moment, second, second], factor, spread, floor)
        assert torch.equal(one.weight, weight)
        found.append(moment)
    rows, scale = one.blocks(second), one.grid.fit(one.blocks(weight)).scale
    largest = terms / 2 * (rows * scale.abs()).sum(1, keepdim=True)  # of all terms of a block's sum, each below 3/2 of g s / 2 by code
    slack = one.unblock((4 * EPS * (largest * rows.shape[1] + terms * rows * scale)).expand_as(rows)) + 4 * EPS * start.abs()
    assert ((found[0] - found[1]).abs() <= slack).all()
    bound = (second * spread).sqrt() + floor
    assert ((found[1] - start).abs() >= (0.999 * bound * factor)).any()  # the bound binds somewhere
    assert ((found[0] - start).abs() > 0).float().mean() > 0.5


def test_weights_on_the_grid_are_not_pushed():
    quantizer = sw.int4(block=32)
    one = managed(quantizer(gaussian(24, 160, seed=3)), sw.lotion(quantizer, loss_terms=1, through_scale=False))
    moment, one_number = torch.zeros(24, 160), torch.ones((), dtype=torch.float64)
    fused.run(passes.push, one, told(one, 1e6), [one.weight, moment, torch.ones(24, 160), torch.ones(24, 160)], *[one_number] * 3)
    assert torch.equal(moment, torch.zeros(24, 160))


def trained(method, *, compile=None, model=None, steps=5, dtype=torch.float32):
    """Return latent and shown weights after some steps, and the run."""
    model = network(dtype=dtype) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, method, optimizer, compile=compile)
    train(model, optimizer, batches(steps, dtype=dtype))
    return {**latents(run, model), **{f"shown {name}": value for name, value in weights(model).items()}}, run


@pytest.mark.parametrize(
    ("shape", "block", "axis", "cut"),
    [
        ((8, 16), 4, None, (32, 4)),
        ((8, 16), 4, -1, (32, 4)),
        ((8, 16), 4, 0, None),  # blocks lie across memory
        ((8, 16), None, 0, (1, 128)),
        ((8, 4, 2, 2), "channel", None, (8, 16)),
        ((8, 4, 2, 2), "channel", 1, None),
        ((8, 4, 1, 1), 2, 1, (16, 2)),
        ((6,), "channel", None, (1, 6)),
        ((2, fused.LONGEST), "channel", None, (2, fused.LONGEST)),
        ((2, fused.LONGEST + 1), "channel", None, None),
    ],
    ids=str,
)
def test_kernels_see_a_weight_as_the_blocks_that_it_has(shape, block, axis, cut):
    weight = torch.arange(math.prod(shape)).reshape(shape)
    assert fused._cut(weight.shape, block, axis) == cut
    if cut is not None:
        assert torch.equal(to_blocks(weight, block, axis), weight.reshape(cut))


@pytest.fixture
def cheap(monkeypatch):
    """Let kernels pay for any model."""
    monkeypatch.setattr(fused, "PAYS", 1)


METHODS = {
    "ste": lambda q: sw.ste(q),
    "lotion": lambda q: sw.lotion(q, loss_terms=64),
    "ste + lotion": lambda q: sw.lotion(q, loss_terms=64, forward="nearest"),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_with_kernels_equals_training_without(name, cheap):
    """As for the compiled path: sums in another order move a weight by 1e-6 of the rate, 0.01, per step, and Adam's root by a few times."""
    expected, eager = trained(METHODS[name](sw.int3(block=16)), compile=False)
    found, run = trained(METHODS[name](sw.int3(block=16)))
    assert "numba path" in repr(run)
    assert "eager path" in repr(eager)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0 if name == "ste" else 2e-7)
    assert not same(found, weights(network()))


def test_threads_leave_no_trace(cheap, monkeypatch):
    one, _ = trained(METHODS["ste + lotion"](sw.int3(block=16)))
    monkeypatch.setattr(fused, "SHARE", 100)
    cuts, spread = [], fused.spread

    def counted(work, rows, **options):
        parts = []
        spread(lambda start, stop: parts.append(start) or work(start, stop), rows, **options)
        cuts.append(len(parts))

    monkeypatch.setattr(fused, "spread", counted)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three, _ = trained(METHODS["ste + lotion"](sw.int3(block=16)))
    finally:
        torch.set_num_threads(threads)
    assert 3 in cuts
    assert same(one, three)


@pytest.mark.parametrize(
    "method",
    [
        sw.ste(sw.nvfp4()),
        sw.ste(sw.intn(3, block=16, scale=0.1)),
        sw.ste(sw.intn(3, block=16, scale_dtype="bf16")),
        sw.ste(sw.intn(3, block=16, levels="affine")),
        sw.ste(sw.intn(3, block=16, compute="bf16")),
        sw.soft(sw.nvfp4(), temperature=0.1),
        sw.learned(sw.ste(sw.int3(block=16), clip=0.8)),
    ],
    ids=lambda method: f"{method.name} {method.quantizer}",
)
def test_what_kernels_do_not_know_is_left_to_the_eager_path(method, cheap):
    found, run = trained(method)
    assert "eager path" in repr(run)
    assert same(found, trained(method, compile=False)[0])


def test_what_kernels_cannot_reach_is_left_to_the_eager_passes(cheap):
    """Beside a weight that they serve: double precision, and a convolution whose memory is in another order."""

    def mixed():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 2), torch.nn.Flatten(), torch.nn.Linear(32, 16), torch.nn.Linear(16, 4))
        model[3].double()
        return model.to(memory_format=torch.channels_last)

    found = []
    for compile in (None, False):
        model = mixed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = sw.attach(model, METHODS["ste + lotion"](sw.int3(block=16)), optimizer, compile=compile)
        assert ("numba path" in repr(run)) == (compile is None)
        for step in range(3):
            for k, parameter in enumerate(model.parameters()):
                draw = gaussian(1, parameter.numel(), seed=10 * step + k, dtype=parameter.dtype).reshape(parameter.shape)
                parameter.grad = torch.empty_like(parameter).copy_(draw)
            optimizer.step()
        found.append(latents(run, model))
    for name in ("0.weight", "3.weight"):
        assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0]["0.weight"], mixed()[0].weight)


def test_kernels_are_for_models_that_pay(monkeypatch):
    method = METHODS["lotion"](sw.int3(block=16))
    assert "eager path" in repr(trained(method)[1])
    monkeypatch.setattr(fused, "PAYS", 1)
    assert "numba path" in repr(trained(method)[1])


@pytest.mark.parametrize("missing", ["numba", "place for its cache"])
def test_without_numba_the_run_is_eager(missing, cheap, monkeypatch):
    """It is absent, or it raises because it may write neither beside the package nor into the user's folder."""
    monkeypatch.delitem(sys.modules, "stepwell.run.kernels", raising=False)
    monkeypatch.delattr("stepwell.run.kernels", raising=False)
    if missing == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    fused.kernels.cache_clear()
    try:
        found, run = trained(METHODS["ste"](sw.int3(block=16)))
        assert fused.kernels() is None
    finally:
        fused.kernels.cache_clear()
    assert "eager path" in repr(run)
    assert same(found, trained(METHODS["ste"](sw.int3(block=16)), compile=False)[0])


def test_writes_are_seen_by_autograd():
    """A backward pass over a weight that a step has changed since is refused, as after any other write."""
    one = managed(gaussian(4, 32, seed=0), sw.ste(sw.int3(block=16)))
    inputs = torch.ones(2, 32, requires_grad=True)
    loss = (inputs @ one.parameter.T).sum()
    with torch.no_grad():
        fused.run(passes.deploy, one, told(one), [one.weight, torch.empty(4, 32)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("quantizer", [sw.int3(block=16), sw.nvfp4(), sw.intn(3, block=16, scale="mse"), sw.int4(block=None)], ids=str)
@pytest.mark.parametrize("compile", [None, False], ids=["kernels", "eager"])
def test_scales_are_fitted_to_what_longer_steps_make_of_weights(quantizer, compile, cheap):
    """Twice the rate in a group of their own is the same, but for the rounding of a weight that moves by .02."""
    found = []
    for rate, method in ((0.02, sw.ste(quantizer)), (0.01, sw.faster(sw.ste(quantizer), 2.0))):
        layer = torch.nn.Linear(64, 16, bias=False)
        layer.weight.data = gaussian(16, 64, seed=1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
        run = sw.attach(layer, method, optimizer, refit=1, compile=compile)
        for step in range(3):
            layer.weight.grad = gaussian(16, 64, seed=step)
            optimizer.step()
        shown = layer.weight.detach().clone()
        latent, encoded = latents(run, layer)["weight"], run.finalize()["weight"]
        assert torch.equal(encoded.decode(), shown)
        found.append((latent, encoded.scales))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert (found[0][0] - gaussian(16, 64, seed=1)).abs().max() > 0.02
