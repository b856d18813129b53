"""What people put around an optimizer: groups, schedules, clipping, accumulation, tying, freezing, autocast, other dtypes and layouts.

The claim is the same everywhere: after every step the model holds exactly the latent weights on their grid, and the latent weights follow
the optimizer that the user chose.
"""

import copy
import warnings

import pytest
import torch
from tests.reference.ste import Round
from tests.run.training import MOMENTS, OPTIMIZERS, QUANTIZED, batches, latents, network, ones, same, train, weights
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import stepwell as sw

Q = sw.int3(block=16)


def on_grid(model, held, names=QUANTIZED, quantizer=Q):
    """Whether the model shows exactly the latent weights on their grid."""
    shown = weights(model)
    return all(torch.equal(shown[name], quantizer(held[name])) for name in names)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("forward", ["ste", "ste + lotion"])
def test_every_optimizer_sees_the_gradient_at_the_grid_and_moves_the_latent_weight(optimizer, forward):
    """Under Adam the first step has no penalty: it is the optimizer's own, from the latent weight with the gradient at the grid."""
    model, plain = network(), network()
    made, other = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](plain.parameters())
    curvature = None if optimizer in MOMENTS else ones(model)
    method = sw.ste(Q) if forward == "ste" else sw.lotion(Q, loss_terms=64, forward="nearest", curvature=curvature)
    run = sw.attach(model, method, made)
    (pair,) = batches(1)
    train(model, made, [pair])
    held = dict(plain.named_parameters())
    seen = {name: Round.apply(held[name], 3, 16, None) for name in QUANTIZED}
    mse_loss(functional_call(plain, seen, (pair[0],)), pair[1]).backward()
    other.step()
    found = latents(run, model)
    if forward == "ste" or optimizer in MOMENTS:
        assert same(found, weights(plain))
    losses = train(model, made, batches(60) * 2)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert on_grid(model, latents(run, model))


def test_groups_have_their_own_rate_and_decay_acts_on_latent_weights():
    """With zero gradients AdamW only decays: latent weights shrink by (1 - lr * decay), each group by its own, from their own value."""
    model = network()
    groups = [
        {"params": [model[0].weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [model[2].weight, model[4].weight], "lr": 0.01, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups)
    before = weights(model)
    run = sw.attach(model, sw.ste(Q), optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = latents(run, model)
    assert torch.equal(after["0.weight"], before["0.weight"] * (1 - 0.05))
    assert torch.equal(after["2.weight"], before["2.weight"] * (1 - 0.001))
    assert on_grid(model, after)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Muon], ids=lambda kind: kind.__name__)
def test_several_optimizers_step_their_own_parameters(kind):
    model, reference, data = network(), network(), batches(10)

    def split(net):
        return [
            kind([net[0].weight], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in net.parameters() if p is not net[0].weight]),
        ]

    ours, theirs = split(model), split(reference)
    run = sw.attach(model, sw.ste(Q), ours)
    train(model, ours, data)
    for inputs, targets in data:
        reference.zero_grad()
        held = dict(reference.named_parameters())
        seen = {name: Round.apply(held[name], 3, 16, None) for name in QUANTIZED}
        mse_loss(functional_call(reference, seen, (inputs,)), targets).backward()
        for optimizer in theirs:
            optimizer.step()
    assert same(latents(run, model), weights(reference))
    assert run.steps == 10


def test_clipping_and_accumulation_see_plain_gradients():
    """Two micro-batches with clipping between backward and step equal the same in plain straight-through training."""
    model, reference, data = network(), network(), batches(6)
    ours, theirs = (torch.optim.AdamW(net.parameters(), lr=0.01) for net in (model, reference))
    run = sw.attach(model, sw.ste(Q), ours)
    for first, second in zip(data[::2], data[1::2], strict=True):
        ours.zero_grad()
        theirs.zero_grad()
        for inputs, targets in (first, second):
            (mse_loss(model(inputs), targets) / 2).backward()
            held = dict(reference.named_parameters())
            seen = {name: Round.apply(held[name], 3, 16, None) for name in QUANTIZED}
            (mse_loss(functional_call(reference, seen, (inputs,)), targets) / 2).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) == nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        ours.step()
        theirs.step()
    assert same(latents(run, model), weights(reference))


def test_warm_up_from_zero_counts_its_first_step():
    """A rate of zero is also what torch.distributed.checkpoint uses to create state; a real gradient tells them apart."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 2) / 2)
    run = sw.attach(model, sw.ste(Q), optimizer)
    before = latents(run, model)
    for k, pair in enumerate(batches(3)):
        train(model, optimizer, [pair])
        schedule.step()
        assert run.steps == k + 1
        assert same(latents(run, model), before) == (k == 0)


def test_warm_up_from_zero_counts_its_first_step_with_a_closure():
    """Before a closure runs there are no gradients to look at."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    run = sw.attach(model, sw.ste(Q), optimizer)
    ((inputs, targets),) = batches(1)

    def closure():
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert run.steps == 1


def test_one_cycle_schedule_moves_beta_and_rate():
    """The push divides by the beta that the step will use; a stale one would change the size of the penalty."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=12)
    sw.attach(model, sw.lotion(Q, loss_terms=64), optimizer)
    for pair in batches(3):
        train(model, optimizer, [pair])
        schedule.step()
    state, beta = optimizer.state[model[0].weight], optimizer.param_groups[0]["betas"][0]
    before, curvature = state["exp_avg"].clone(), state["exp_avg_sq"].clone() / (1 - 0.999**3)
    force = sw.methods.lotion.penalty_gradient(model[0].weight.detach(), curvature * 64, Q)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(state["exp_avg"], beta * before + (1 - beta) * force, rtol=1e-4, atol=1e-7)
    assert beta < 0.95


def test_tied_weight_is_one_parameter_with_one_latent():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, sw.ste(Q), optimizer)
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()
    assert model.down.weight is model.up.weight
    assert len(run.health().parameters) == 1
    assert torch.equal(model.down.weight, Q(latents(run, model)["up.weight"]))
    assert list(run.finalize()) == ["up.weight"]


@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
def test_frozen_weight_is_deployed_and_stays(held):
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    parameters = list(model.parameters()) if held else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    run = sw.attach(model, sw.ste(Q), optimizer, start=1)
    assert torch.equal(model[0].weight, before)
    for pair in batches(3):
        train(model, optimizer, [pair])
        assert torch.equal(model[0].weight, Q(before))  # from the first step on, as the others
    assert torch.equal(latents(run, model)["0.weight"], before)
    assert torch.equal(run.finalize()["0.weight"].decode(), Q(before))


def test_thawed_weight_that_no_optimizer_holds_is_refused_at_the_step():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    sw.attach(model, sw.ste(Q), optimizer)
    model[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'0.weight' was frozen.*detach"):
        train(model, optimizer, batches(1))


def test_methods_by_name_and_none_in_the_mapping():
    model, fine, coarse = network(), sw.int4(block=32), sw.int2(block=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, {"0": sw.ste(fine), "4.weight": None, "*": sw.lotion(coarse, loss_terms=64, forward="nearest")}, optimizer)
    before = weights(model)
    train(model, optimizer, batches(5))
    held = latents(run, model)
    assert on_grid(model, held, ["0.weight"], fine)
    assert on_grid(model, held, ["2.weight"], coarse)
    assert not torch.equal(model[4].weight, before["4.weight"])
    assert {name: encoded.quantizer for name, encoded in run.finalize().items()} == {"0.weight": fine, "2.weight": coarse}
    assert "ste on int4 block 32" in repr(run)


@pytest.mark.parametrize(
    "method", [sw.ste(Q), sw.lotion(Q, loss_terms=64), sw.ste(sw.intn(3, block=16, scale="mse"))], ids=lambda m: m.name
)
def test_training_before_start_is_plain_bit_for_bit(method):
    model, plain, data = network(), network(), batches(6)
    ours, theirs = torch.optim.AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(plain.parameters(), lr=0.01)
    run = sw.attach(model, method, ours, start=4)
    assert train(model, ours, data[:4]) == train(plain, theirs, data[:4])
    with run.latent():
        assert same(weights(model), weights(plain))
    reference = weights(plain)
    train(plain, theirs, data[4:])
    train(model, ours, data[4:])
    assert not same(latents(run, model), weights(plain))
    if method.deploy is not None:  # from there on it is a run that was attached to the trained weights
        late = network()
        late.load_state_dict(reference)
        again = torch.optim.AdamW(late.parameters(), lr=0.01)
        again.load_state_dict(plain_state(data[:4]))
        later = sw.attach(late, method, again)
        train(late, again, data[4:])
        assert same(latents(later, late), latents(run, model))


def plain_state(data):
    """Return the optimizer state of plain training."""
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    train(plain, optimizer, data)
    return optimizer.state_dict()


@pytest.mark.parametrize("whole_loop", [False, True], ids=["forward", "whole loop"])
def test_autocast_does_not_reuse_a_cast_weight(whole_loop):
    """Autocast caches bf16 casts of leaves; a loop wholly inside it would go on with the first cast if swapping did not clear the cache."""
    model, fresh = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = sw.attach(model, sw.ste(Q), optimizer)
    inputs, targets = batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=whole_loop):
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = model(inputs)
            fresh.load_state_dict(weights(model))
            assert torch.equal(found, cast_forward(fresh, inputs))
            optimizer.zero_grad()
            mse_loss(found.float(), targets).backward()
            optimizer.step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs)
            with run.latent():
                found = model(inputs)
                fresh.load_state_dict(weights(model))
            shown = model(inputs)
    assert torch.equal(found, cast_forward(fresh, inputs))
    assert not torch.equal(found, shown)


def cast_forward(model, inputs):
    """Run a model in bf16 by autocast with no cache."""
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        return model(inputs)


def test_autocast_inside_a_closure_sees_trial_weights():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    sw.attach(model, sw.ste(Q), optimizer)
    inputs, targets = batches(1)[0]
    fresh = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):

        def closure():
            optimizer.zero_grad()
            found = model(inputs)
            fresh.load_state_dict(weights(model))
            assert torch.equal(found, cast_forward(fresh, inputs))
            loss = mse_loss(found.float(), targets)
            loss.backward()
            return loss

        optimizer.step(closure)


def test_non_contiguous_and_convolution_weights_train_like_contiguous_ones():
    """A channels-last convolution: other memory, the same numbers to rounding error of the convolution, the same blocks."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = sw.attach(model, sw.lotion(sw.int3(block=12), loss_terms=64, forward="nearest"), optimizer, skip=["2"])
        for step in range(4):
            for k, parameter in enumerate(model.parameters()):
                wave = torch.sin(torch.arange(parameter.numel()) * (k + 0.7) + step).reshape(parameter.shape)
                parameter.grad = wave.to(parameter.dtype).clone(memory_format=torch.preserve_format)
                if k == 0:
                    parameter.grad = parameter.grad.contiguous(memory_format=layout)
            optimizer.step()
        results.append((latents(run, model), weights(model)))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert same(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])
    assert not results[0][0]["0.weight"].equal(results[0][1]["0.weight"])


def test_transposed_weight_is_legal():
    model = nn.Linear(32, 48)
    model.weight = nn.Parameter(torch.randn(32, 48).T)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.attach(model, sw.ste(Q), optimizer)
    assert torch.equal(model.weight, Q(before))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(latents(run, model)["weight"], before - 0.1)
    assert not model.weight.is_contiguous()


class Conv1D(nn.Module):
    """GPT-2's layer, known by its name: the weight is stored as (in, out)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous())

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("method", [sw.ste(Q), sw.lotion(Q, loss_terms=64, forward="nearest")], ids=["ste", "ste + lotion"])
def test_weight_whose_first_dimension_is_contracted_trains_as_its_transpose(method):
    """Blocks are then no views of the weight: every pass copies them out and back."""
    weight = torch.randn(8, 32)
    models = [nn.Sequential(nn.Linear(32, 8, bias=False)), nn.Sequential(Conv1D(weight))]
    models[0][0].weight.data = weight.clone()
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sw.attach(model, method, optimizer)
        for step in range(4):
            gradient = torch.sin(torch.arange(256.0) + step).reshape(8, 32)
            model[0].weight.grad = gradient.clone() if model is models[0] else gradient.T.contiguous()
            optimizer.step()
    assert torch.equal(models[0][0].weight, models[1][0].weight.T)
    assert not torch.equal(models[0][0].weight, Q(weight))


def test_half_precision_parameters_warn_once_and_train_as_plainly():
    """Updates below bf16's resolution are lost, as in plain training; what is shown is the latent weight on its grid, in bf16."""
    model = network(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="3 parameters such as '0.weight'.*below its resolution") as caught:
        run = sw.attach(model, sw.lotion(sw.int3(block=16), loss_terms=64, forward="nearest"), optimizer)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, batches(5, dtype=torch.bfloat16))
    held = latents(run, model)
    assert on_grid(model, held)
    assert all(value.dtype == torch.bfloat16 for value in held.values())
    encoded = run.finalize()
    assert torch.equal(encoded["0.weight"].decode().bfloat16(), model[0].weight)


@pytest.mark.parametrize(
    "method",
    [sw.ste(Q), sw.lsq(Q), sw.fisher(sw.lotion(Q, loss_terms=1e-3)), sw.learned(sw.fisher(sw.lotion(Q, loss_terms=1e-3)))],
    ids=lambda method: method.name,
)
def test_model_may_be_cast_after_attach(method):
    """`model.to(float64)` gives parameters new memory with the same values: no outside write, and latent weights and own tensors follow."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.attach(model, method, optimizer)
    before = latents(run, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double()
        train(model, optimizer, batches(2, dtype=torch.float64))
        held = latents(run, model)
    assert held["0.weight"].dtype == torch.float64
    assert not torch.equal(held["0.weight"].float().double(), held["0.weight"])  # trained in float64, not through float32
    assert (held["0.weight"] - before["0.weight"]).abs().max() < 0.5
    assert {tensor.dtype for one in run._managed for tensor in one.tensors.values()} <= {torch.float64}


def test_deep_copy_of_the_model_holds_what_the_forward_pass_sees_and_is_free():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sw.attach(model, sw.ste(Q), optimizer)
    train(model, optimizer, batches(2))
    average = copy.deepcopy(model)
    shown = weights(model)
    assert same(weights(average), shown)
    train(model, optimizer, batches(1))
    assert same(weights(average), shown)
    other = copy.deepcopy(optimizer)  # hooks stay behind: a copied optimizer steps plainly
    other.step()
    assert not same(weights(model), shown)


@pytest.mark.slow
def test_compiled_optimizer_step_runs_the_hooks_as_they_are():
    """torch.compile(optimizer.step) fuses Adam's arithmetic, which moves weights by rounding errors; the hooks are not traced."""
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = sw.attach(model, sw.lotion(Q, loss_terms=64, forward="nearest"), optimizer)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for inputs, targets in batches(4):
            optimizer.zero_grad()
            mse_loss(model(inputs), targets).backward()
            step()
        assert run.steps == 4
        results.append(latents(run, model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_model_sees_every_swap():
    """The forward pass is the plain model: torch.compile traces it once and reads the parameters anew."""
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sw.attach(model, sw.ste(Q), optimizer)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        losses = []
        for inputs, targets in batches(5):
            optimizer.zero_grad()
            loss = mse_loss(forward(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-6)
