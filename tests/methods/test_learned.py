"""Scales that are searched, held and learned: against LSQ as a module with torch's own Adam, and what must never happen to them."""

import math
import warnings

import pytest
import torch
from tests.cases import GRIDS, gaussian
from tests.reference.relatives import Carried, Fake
from tests.run.training import batches, latents, network, train, weights

import stepwell as sw
from stepwell.methods.learned import MIDDLE, SCALE
from stepwell.run.managed import SCALE as HELD
from stepwell.scales import store


def scales_of(optimizer, index=0):
    """Return the scales that a run learns, `(blocks, 1)`, as its state dictionary holds them."""
    return optimizer.state_dict()["state"][index]["method_tensor_scale"].clone().reshape(-1, 1)


@pytest.mark.parametrize(
    "quantizer",
    [sw.int3(block=8), sw.intn(2, block=8, levels="mid"), sw.intn(3, block=16, levels="full"), sw.int4(block="channel")],
    ids=str,
)
def test_lsq_is_a_module_with_torchs_adam_on_the_log_scale(quantizer):
    """Weights, scales and losses of thirty steps; rounding errors of 1e-16 grow by a few per step, and no code changes for it.

    The scales start a little below the searched ones, else a block's largest weight lies on the very edge of its grid.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 6, bias=False, dtype=torch.float64)
    start = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    run = sw.attach(layer, sw.lsq(quantizer, rate=0.03), optimizer)
    state = optimizer.state_dict()
    state["state"][0]["method_tensor_scale"] *= 0.97
    optimizer.load_state_dict(state)
    format, block = quantizer.format, 16 if quantizer.block == "channel" else quantizer.block
    reference = Fake(start, scales_of(optimizer), block, format.low, format.high)
    if format.levels == "mid":
        reference.forward = lambda x: middle(reference, x)
    groups = [{"params": [reference.weight], "lr": 0.02}, {"params": [reference.theta], "lr": 0.03, "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups)
    for step in range(30):
        for group, made in ((optimizer.param_groups[0], 0.02), (other.param_groups[0], 0.02), (other.param_groups[1], 0.03)):
            group["lr"] = made * (1 - step / 40)  # the scales' rate falls with the optimizer's
        inputs, targets = gaussian(32, 16, seed=step, dtype=torch.float64), gaussian(32, 6, seed=-step - 1, dtype=torch.float64)
        losses = []
        for model, stepper in ((layer, optimizer), (reference, other)):
            stepper.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            stepper.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(scales_of(optimizer), reference.sign * reference.theta.detach().exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(latents(run, layer)["weight"], reference.weight.detach(), rtol=0, atol=1e-9)
    assert (scales_of(optimizer).abs().log() - reference.theta.detach().mean()).abs().max() > 0.05  # they have learned


@pytest.mark.parametrize("quantizer", [sw.int3(block=8), sw.intn(3, block=16, levels="full")], ids=str)
def test_carried_weights_follow_torchs_adam_on_scales_that_keep_the_codes(quantizer):
    """Weights and scales of thirty steps against autograd's slope at fixed codes, to what rounding errors grow to."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 6, bias=False, dtype=torch.float64)
    start = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    run = sw.attach(layer, sw.learned(sw.ste(quantizer), rate=0.03, carry=True), optimizer)
    state = optimizer.state_dict()
    state["state"][0]["method_tensor_scale"] *= 0.97  # off the very edge
    optimizer.load_state_dict(state)
    reference = Carried(start, scales_of(optimizer), quantizer.block, quantizer.format.low, quantizer.format.high)
    outer = torch.optim.AdamW([reference.weight], lr=0.02)
    scales = torch.optim.AdamW([reference.theta], lr=0.03, weight_decay=0.0)
    for step in range(30):
        for group, made in ((optimizer.param_groups[0], 0.02), (outer.param_groups[0], 0.02), (scales.param_groups[0], 0.03)):
            group["lr"] = made * (1 - step / 40)
        inputs, targets = gaussian(32, 16, seed=step, dtype=torch.float64), gaussian(32, 6, seed=-step - 1, dtype=torch.float64)
        for model, steppers in ((layer, [optimizer]), (reference, [scales, outer])):
            for stepper in steppers:
                stepper.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            before = reference.theta.detach().clone()
            steppers[0].step()
            if model is reference:
                with torch.no_grad():
                    reference.weight.view(-1, reference.block).mul_((reference.theta - before).exp())
                outer.step()
    torch.testing.assert_close(scales_of(optimizer), reference.sign * reference.theta.detach().exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(latents(run, layer)["weight"], reference.weight.detach(), rtol=0, atol=1e-9)
    assert (scales_of(optimizer).abs().log() - reference.theta.detach().mean()).abs().max() > 0.05


def test_carrying_changes_no_code():
    """Where the optimizer hardly moves weights, scales move by two percent per step, and weights with them."""
    layer = torch.nn.Linear(64, 8, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-12)
    run = sw.attach(layer, sw.learned(sw.ste(sw.intn(3, block=16, levels="full")), rate=0.02, carry=True), optimizer)
    codes, scales, weight = run.encoded()["weight"].codes, scales_of(optimizer), latents(run, layer)["weight"]
    for _ in range(3):
        layer.weight.grad = gaussian(8, 64, seed=1)
        optimizer.step()
    assert torch.equal(run.encoded()["weight"].codes, codes)
    factor = scales_of(optimizer) / scales
    assert (factor.log().abs() > 0.01).all()
    torch.testing.assert_close(latents(run, layer)["weight"], (weight.reshape(-1, 16) * factor).reshape(8, 64))


def test_weights_in_half_precision_are_not_carried():
    """Steps of a percent would be rounded away there, and the scales would learn from a slope that nothing follows."""
    found = []
    for carry in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        sw.attach(layer, sw.learned(sw.ste(sw.int3(block=16)), carry=carry), optimizer)
        layer.weight.grad = gaussian(8, 64, seed=1).bfloat16()
        optimizer.step()
        found.append((scales_of(optimizer), layer.weight.detach().clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def middle(reference, x):
    """Return LSQ's forward pass for half-odd codes."""
    scale = reference.sign * reference.theta.exp()
    clamped = (reference.weight.reshape(-1, reference.block) / scale).clamp(reference.low, reference.high)
    rounded = clamped + ((clamped - 0.5).round() + 0.5 - clamped).detach()
    return x @ (rounded * scale).reshape(reference.weight.shape).T


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_scales_start_where_a_search_puts_them(quantizer):
    """What is stored at the start loses no more than absmax does, and as little as the mean-squared-error rule."""
    layer = torch.nn.Linear(64, 12, bias=False)
    weight = gaussian(12, 64, seed=1)
    layer.weight.data = weight.clone()
    run = sw.attach(layer, sw.held(sw.ste(quantizer)), torch.optim.SGD(layer.parameters(), lr=0.0))
    found = (run.finalize()["weight"].decode() - weight).square().sum()
    slack = 1.05 if quantizer.scale_dtype == "e4m3" else 1 + 1e-5  # e4m3 scales are searched before they are stored
    assert found <= slack * (quantizer(weight) - weight).square().sum()
    if quantizer.scale_dtype == "fp32":
        searched = sw.intn(quantizer.format.bits, block=quantizer.block, scale="mse", levels=quantizer.format.levels or "symmetric")
        if quantizer.format.levels and quantizer.format.name.startswith("int"):
            torch.testing.assert_close(found, (searched(weight) - weight).square().sum())


def test_first_steps_of_a_coarse_scale_do_not_change_what_is_stored():
    for dtype, rounding in MIDDLE:
        stored = torch.tensor([[1.0], [4.0], [0.25]])
        latent = stored * MIDDLE[dtype, rounding]
        for factor in (0.98, 1.02):
            assert torch.equal(store(latent * factor, dtype, rounding), stored)


def test_held_scales_never_move():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    run = sw.attach(model, sw.held(sw.ste(sw.intn(3, block=16, scale="mse"))), optimizer, refit=1)
    before = scales_of(optimizer)
    train(model, optimizer, batches(4))
    assert torch.equal(scales_of(optimizer), before)
    assert torch.equal(run.finalize()["0.weight"].scales.reshape(-1, 1), before)


def test_learned_scales_keep_their_sign_and_move_by_at_most_the_rate():
    """Adam's first step has size one; later ones at most (1 - beta1) / sqrt(1 - beta2), 3.2 for .9 and .999."""
    quantizer = sw.intn(3, block=16, levels="full")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sw.attach(model, sw.lsq(quantizer, rate=0.02), optimizer)
    before = scales_of(optimizer)
    assert (before < 0).any()
    assert (before > 0).any()
    for step in range(6):
        train(model, optimizer, batches(6)[step : step + 1])
        after = scales_of(optimizer)
        assert torch.equal(after.sign(), before.sign())
        assert ((after / before).log().abs() <= 0.02 * (1 + 1e-4 if step == 0 else 3.2)).all()
        before = after


def test_rate_follows_the_optimizers_schedule():
    """A rate of zero at a learning rate of zero, and no step before there was any."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sw.attach(model, sw.lsq(sw.int3(block=16)), optimizer)
    before = scales_of(optimizer)
    train(model, optimizer, batches(1))
    assert torch.equal(scales_of(optimizer), before)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, batches(1))
    moved = scales_of(optimizer)
    assert not torch.equal(moved, before)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, batches(1))
    assert torch.equal(scales_of(optimizer), moved)


def test_penalty_does_not_reach_a_learned_scale():
    """A thousandfold penalty leaves the scales' first two steps alone: they see the loss of the forward pass, which is the same."""
    found = []
    for strength in (0.0, 1000.0):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        method = sw.lotion(sw.int3(block=16), strength=strength, loss_terms=64, forward="nearest")
        sw.attach(model, sw.learned(method), optimizer)
        train(model, optimizer, batches(2))
        found.append(scales_of(optimizer))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_latent_training_learns_scales_that_round_better():
    """The larger half of the weights hardly matters to the loss: the error of the others falls below what the search left of it."""
    layer = torch.nn.Linear(64, 8, bias=False)
    small = (torch.arange(64) % 2 == 0).expand(8, 64)
    weight = gaussian(8, 64, seed=1) * torch.where(small, 0.3, 1.0)
    layer.weight.data = weight.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9)
    importance = torch.where(small, 1.0, 0.05)
    run = sw.attach(layer, sw.learned(sw.lotion(sw.int2(block=64), curvature={"weight": torch.zeros(8, 64)})), optimizer)
    errors = []
    for step in range(80):
        layer.weight.grad = gaussian(8, 64, seed=step) * importance
        if step in (0, 79):
            with run.deployed():
                errors.append((importance.square() * (layer.weight - weight).square()).sum().item())
        optimizer.step()
    assert errors[1] < 0.8 * errors[0]


def test_block_of_zeros_can_leave_zero():
    layer = torch.nn.Linear(32, 4, bias=False)
    layer.weight.data = gaussian(4, 32, seed=0)
    layer.weight.data[1] = 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    sw.attach(layer, sw.lsq(sw.int3(block=32)), optimizer)
    scales = scales_of(optimizer)
    assert scales[1] == pytest.approx(scales[[0, 2, 3]].mean().item(), rel=1e-5)
    layer.weight.grad = torch.ones(4, 32)
    optimizer.step()
    assert (layer.weight[1] != 0).all()
    fresh = torch.nn.Linear(32, 4, bias=False)
    torch.nn.init.zeros_(fresh.weight)
    made = torch.optim.SGD(fresh.parameters(), lr=0.5)
    sw.attach(fresh, sw.lsq(sw.int3(block=32)), made)
    assert scales_of(made).flatten().tolist() == pytest.approx([1 / (3 * math.sqrt(32))] * 4)


def test_weights_loaded_after_attach_get_scales_of_their_own():
    """Build, attach, load: the scales of the random start would be far off."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sw.attach(model, sw.lsq(sw.int3(block=16)), optimizer)
    train(model, optimizer, batches(1))
    before = scales_of(optimizer)
    loaded = {key: 100 * value for key, value in weights(network(3)).items()}
    model.load_state_dict(loaded)
    with pytest.warns(UserWarning, match="written to from outside"):
        after = scales_of(optimizer)
    assert 30 < (after / before).median() < 300
    model.load_state_dict({key: value.clamp(-5, 5) if key == "0.weight" else value for key, value in weights(model).items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(scales_of(optimizer), after)  # a clamp of some weights is no new network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sw.learned(sw.ste(sw.intn(4, levels="affine"))), "`method`: int4/affine.*zero point"),
        (lambda: sw.held(sw.ste(sw.intn(4, scale=0.1))), r"`method`: the scale of int4.*fixed at 0\.1"),
        (lambda: sw.lsq(sw.int4(), rate=-1), "`rate`"),
        (lambda: sw.lsq(sw.int4(), rate=math.nan), "`rate`"),
        (lambda: sw.learned(sw.ste(sw.int4()), betas=(0.9, 1.0)), "`betas`"),
        (lambda: sw.learned(sw.ste(sw.int4()), eps=0.0), "`eps`"),
        (lambda: sw.learned(sw.lotion(sw.int4(), loss_terms=8), carry=True), "`carry` needs a rounded forward pass.*lotion has none"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scales_are_wrapped_once():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"has scales of its own\. Wrap it once"):
        sw.attach(model, sw.learned(sw.held(sw.ste(sw.int3(block=16)))), optimizer)
    assert not any(optimizer._optimizer_step_pre_hooks.values())
    with pytest.raises(TypeError, match="`method` must be a method"):
        sw.learned(sw.int4())
    assert SCALE == HELD
