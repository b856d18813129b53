"""sw.attach with sw.optim.AdamW: the optimizer makes the step of what it knows, the hooks the rest, and nobody sees a difference.

Straight-through training is equal bit for bit to torch's fused AdamW inside the hooks. LOTION's scale term is a sum over a block in another
order: relative error 16 * 2**-24 = 1e-6 of a force that moves a weight by at most the rate, 0.01, per step; over 8 steps 8e-8, and Adam's
division by the root of a small second moment is worth a factor of a few (as in tests/run/test_passes.py).
"""

import warnings

import pytest
import torch
from tests.cases import gaussian
from tests.run.training import QUANTIZED, batches, latents, network, same, train, weights
from torch.nn.functional import mse_loss

import stepwell as sw
from stepwell.optim import AdamW, engines

Q = sw.int3(block=16)
SUMS, STEPS = 2e-7, 8
FULL = sw.intn(4, block=16, levels="full")
SEARCHED = sw.intn(3, block=16, scale="mse")
METHODS = {
    "ste": sw.ste(Q),
    "ste, full": sw.ste(FULL),
    "ste, channels": sw.ste(sw.int4(block="channel")),
    "ste, tensor": sw.ste(sw.int4(block=None)),
    "ste, searched": sw.ste(SEARCHED),
    "ste, held": sw.held(sw.ste(Q)),
    "lotion": sw.lotion(Q, loss_terms=64),
    "lotion, full": sw.lotion(FULL, loss_terms=64),
    "lotion, detached": sw.lotion(Q, loss_terms=64, through_scale=False),
    "ste + lotion": sw.lotion(Q, loss_terms=64, forward="nearest"),
    "ste + lotion, held": sw.held(sw.lotion(Q, loss_terms=64, forward="nearest")),
    "lotion, searched": sw.lotion(SEARCHED, loss_terms=64),
}
OTHERS = {
    "clipped": sw.ste(Q, clip=0.8),
    "parq": sw.parq(Q, slope=0.5),
    "learned": sw.learned(sw.ste(Q)),
    "fp4": sw.ste(sw.fp4(block=16)),
    "affine": sw.ste(sw.intn(3, block=16, levels="affine")),
    "mid": sw.lotion(sw.intn(3, block=16, levels="mid"), loss_terms=64),
    "fp16 scales": sw.ste(sw.intn(3, block=16, scale_dtype="fp16")),
    "computed in bf16": sw.ste(sw.intn(3, block=16, compute="bf16")),
    "fixed scale": sw.ste(sw.intn(3, block=16, scale=0.1)),
    "other axis": sw.ste(sw.intn(3, block=4, axis=0)),
    "given curvature": sw.lotion(Q, curvature=lambda name: torch.ones(dict(network().named_parameters())[name].shape)),
}


def torch_fused(parameters, **options):
    return torch.optim.AdamW(parameters, fused=True, **options)


def trained(method, kind, *, steps=STEPS, start=0, skip=(), **options):
    """Return the model, the optimizer and the run after some steps."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    run = sw.attach(model, method, optimizer, refit=3, start=start, skip=skip)
    train(model, optimizer, batches(steps))
    return model, optimizer, run


def outcome(model, optimizer, run):
    """Return latent weights, shown weights, moments and counts."""
    state = {
        f"{k} {key}": value.clone()
        for k, p in enumerate(model.parameters())
        for key, value in optimizer.state[p].items()
        if value is not None
    }
    return {**latents(run, model), **{f"shown {name}": value for name, value in weights(model).items()}, **state}


@pytest.fixture
def counted(monkeypatch):
    """Count the parameters that were stepped in one pass."""
    seen, run = [], engines.run

    def counting(engine, arrays, block, numbers):
        seen.append(block)
        run(engine, arrays, block, numbers)

    monkeypatch.setattr(engines, "run", counting)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_one_pass_equals_the_hooks_around_torchs_fused_step(kernel, name, counted):
    (model, optimizer, run), reference = trained(METHODS[name], AdamW), trained(METHODS[name], torch_fused)
    assert len(counted) == STEPS * len(QUANTIZED)
    assert "one-pass path" in repr(run)
    found, expected = outcome(model, optimizer, run), outcome(*reference)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith("shown") and "lotion" in name:
            continue  # an ulp of the latent weight may be a step of the grid
        torch.testing.assert_close(found[key], value, rtol=0, atol=0 if name.startswith("ste,") or name == "ste" else SUMS)
    assert all(torch.equal(weights(model)[k], run.finalize()[k].decode()) for k in QUANTIZED[:1]) or name.startswith("lotion")


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernels_do_not_know_goes_through_the_hooks(kernel, name, counted):
    ours, reference = trained(OTHERS[name], AdamW), trained(OTHERS[name], torch_fused)
    assert not counted
    assert "one-pass" not in repr(ours[2])
    assert same(outcome(*ours), outcome(*reference))


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"betas": (0.4, 0.9), "weight_decay": 0.3}], ids=str)
def test_options_of_the_optimizer(kernel, options, counted):
    ours, reference = trained(METHODS["ste"], AdamW, **options), trained(METHODS["ste"], torch_fused, **options)
    assert bool(counted) == ("amsgrad" not in options)
    assert same(outcome(*ours), outcome(*reference))


def test_lotion_costs_no_memory_and_straight_through_one_latent_copy(kernel):
    for name, copies in (("lotion", 0), ("ste", 1), ("ste + lotion", 1)):
        model, optimizer, run = trained(METHODS[name], AdamW)
        managed = sum(p.numel() for key, p in model.named_parameters() if key in QUANTIZED)
        held = [t for entry in optimizer.state_dict()["state"].values() for key, t in entry.items() if t is not None]
        plain = 2 * sum(p.numel() for p in model.parameters())
        assert sum(t.numel() for t in held if t.ndim) == plain + copies * managed
        assert f"{copies * managed * 4 / 1e6:.1f} MB of latent weights" in repr(run)


def test_known_and_unknown_methods_in_one_model(kernel, counted):
    """The first weight goes in one pass, the second through the hooks, the third and the biases are plain."""
    mapping = {"0": METHODS["ste"], "2": OTHERS["clipped"], "4": None}
    ours, reference = trained(mapping, AdamW), trained(mapping, torch_fused)
    assert len(counted) == STEPS
    assert same(outcome(*ours), outcome(*reference))


def test_steps_before_the_start_are_plain(kernel, counted):
    ours, reference = trained(METHODS["ste"], AdamW, start=3), trained(METHODS["ste"], torch_fused, start=3)
    assert len(counted) == (STEPS - 3) * len(QUANTIZED)
    assert same(outcome(*ours), outcome(*reference))


def test_without_any_kernel_the_hooks_do_it(monkeypatch):
    monkeypatch.setattr(engines, "best", lambda: None)
    ours, reference = trained(METHODS["ste"], AdamW), trained(METHODS["ste"], torch_fused)
    assert ours[1].kernel is None
    assert "eager path" in repr(ours[2])
    assert same(outcome(*ours), outcome(*reference))


def test_who_asks_for_the_eager_passes_gets_them(kernel, counted):
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, METHODS["ste"], optimizer, compile=False, refit=3)
    train(model, optimizer, batches(STEPS))
    assert not counted
    assert "eager path" in repr(run)
    assert same(outcome(model, optimizer, run), outcome(*trained(METHODS["ste"], AdamW)))


def test_weights_that_no_kernel_can_work_on(kernel, counted):
    """Another order in memory and double precision go through the hooks; both train like contiguous float32 ones beside them."""
    found = []
    for kind in (AdamW, torch_fused):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(16, 8, 2), torch.nn.Flatten(), torch.nn.Linear(32, 16), torch.nn.Linear(16, 16))
        model[3].double()
        model = model.to(memory_format=torch.channels_last)
        optimizer = kind(model.parameters(), lr=0.01)
        run = sw.attach(model, METHODS["ste"], optimizer)
        for step in range(4):
            for k, parameter in enumerate(model.parameters()):
                draw = gaussian(1, parameter.numel(), seed=10 * step + k, dtype=parameter.dtype).reshape(parameter.shape)
                parameter.grad = torch.empty_like(parameter).copy_(draw)
            optimizer.step()
        found.append(outcome(model, optimizer, run))
    assert len(counted) == 4  # the one Linear in float32
    assert same(*found)


class Failing(AdamW):
    """Fails on demand before or after the step in one pass."""

    fails: str | None = None

    def _step_in_one_pass(self, group, pairs):
        if self.fails == "before":
            raise OSError("device lost")
        super()._step_in_one_pass(group, pairs)
        if self.fails == "after":
            raise OSError("device lost")


@pytest.mark.parametrize("name", ["ste", "lotion", "ste + lotion"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_failed_step_is_repaired_by_the_next_call(kernel, name, when):
    """What the optimizer has stepped stays stepped, moments and all; the model shows the latent weights, and nothing is stepped twice."""
    model, optimizer, run = trained(METHODS[name], Failing)
    before = outcome(model, optimizer, run)
    optimizer.fails = when
    inputs, targets = batches(1, seed=5)[0]
    mse_loss(model(inputs), targets).backward()
    with pytest.raises(OSError, match="device lost"):
        optimizer.step()
    optimizer.fails = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # repaired weights are ours, not an outside write
        after = outcome(model, optimizer, run)
    assert same(before, after) == (when == "before")
    assert run.steps == STEPS
    if name != "lotion":
        assert torch.equal(model[0].weight, Q(after["0.weight"]))
    run.detach()
    held = weights(model)
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()  # no task is left over
    assert same(held, weights(model))


@pytest.mark.parametrize("name", ["ste", "lotion", "ste + lotion"])
def test_closures_scaled_gradients_and_missing_ones(kernel, name):
    """A closure runs on what the forward pass sees; under a GradScaler torch's own step is taken, and a skipped step changes nothing."""
    plain = trained(METHODS[name], AdamW)
    closed, scaled = network(), network()
    optimizers = [AdamW(model.parameters(), lr=0.01) for model in (closed, scaled)]
    runs = [sw.attach(model, METHODS[name], made, refit=3) for model, made in zip((closed, scaled), optimizers, strict=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for inputs, targets in batches(STEPS):

        def closure(inputs=inputs, targets=targets):
            optimizers[0].zero_grad()
            loss = mse_loss(closed(inputs), targets)
            loss.backward()
            return loss

        optimizers[0].step(closure)
        optimizers[1].zero_grad()
        scaler.scale(mse_loss(scaled(inputs), targets)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    expected = outcome(*plain)
    assert same(outcome(closed, optimizers[0], runs[0]), expected)
    found = outcome(scaled, optimizers[1], runs[1])
    for key in QUANTIZED:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0 if name == "ste" else SUMS)
    scaler.scale(mse_loss(scaled(inputs), targets)).backward()
    scaled[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizers[1])
    assert same(outcome(scaled, optimizers[1], runs[1]), found)
    closed[2].weight.grad = None
    before = latents(runs[0], closed)
    optimizers[0].step()
    after = latents(runs[0], closed)
    assert torch.equal(before["2.weight"], after["2.weight"])
    assert not torch.equal(before["0.weight"], after["0.weight"])


def test_compiled_optimizer_step_is_not_traced(kernel):
    """torch.compile(optimizer.step) runs it as it is, hooks and kernels included."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, METHODS["ste + lotion"], optimizer, refit=3)
    step = torch.compile(optimizer.step)
    for inputs, targets in batches(STEPS):
        optimizer.zero_grad()
        mse_loss(model(inputs), targets).backward()
        step()
    assert same(outcome(model, optimizer, run), outcome(*trained(METHODS["ste + lotion"], AdamW)))


class Nested(AdamW):
    """Calls its parent's step, so that every hook fires twice."""

    def step(self, closure=None):
        return super().step(closure)


def test_subclass_that_calls_its_parent_steps_once(kernel):
    AdamW([torch.nn.Parameter(torch.ones(1))])  # from its first instance on, AdamW.step itself fires hooks
    assert same(outcome(*trained(METHODS["ste + lotion"], Nested)), outcome(*trained(METHODS["ste + lotion"], AdamW)))
