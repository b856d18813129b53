"""What somebody else does to the model, the optimizer or the order of calls is adopted or refused, never lost in silence."""

import warnings

import pytest
import torch
from tests.cases import gaussian
from torch import nn

import stepwell as sw
from stepwell.schedules import linear

Q = sw.int4(block=16)


def trained(method=None, *, steps=5, seed=0):
    """Return a layer, its optimizer and its run after a few steps."""
    torch.manual_seed(seed)
    layer = nn.Linear(32, 16, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    run = sw.attach(layer, method or sw.ste(Q), optimizer)
    step(layer, optimizer, steps)
    return layer, optimizer, run


def step(layer, optimizer, steps=1):
    for k in range(steps):
        inputs = gaussian(8, 32, seed=k)
        optimizer.zero_grad()
        (layer(inputs) - inputs[:, :16]).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*outside the run")
@pytest.mark.parametrize("end", ["finalize", "deployed", "latent", "health", "state_dict"])
def test_a_write_through_data_is_seen_by_every_public_call(end):
    """`.data` does not count up the tensor's version, so only the value tells."""
    layer, optimizer, run = trained()
    layer.weight.data.copy_(torch.ones(16, 32))
    if end == "state_dict":
        optimizer.state_dict()
    elif end in ("deployed", "latent"):
        with getattr(run, end)():
            assert torch.equal(layer.weight, torch.ones(16, 32))
    else:
        getattr(run, end)()
    assert torch.equal(layer.weight, torch.ones(16, 32))


@pytest.mark.filterwarnings("ignore:.*outside the run")
def test_a_write_to_one_element_leaves_the_other_latent_weights():
    layer, _, run = trained()
    with run.latent():
        before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[3, 5] = 0.01
    with run.latent():
        after = layer.weight.detach().clone()
    changed = before != after
    assert changed.sum() == 1
    assert changed[3, 5]


@pytest.mark.filterwarnings("ignore:.*outside the run")
@pytest.mark.parametrize("quantizer", [Q, sw.target("gguf:q4_0"), sw.int3(block=16, scale="mse"), sw.nvfp4()], ids=str)
def test_reloading_earlier_deployed_weights_and_finalizing_gives_exactly_these(quantizer):
    layer, optimizer, run = trained(sw.ste(quantizer))
    best = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    step(layer, optimizer, 10)
    assert not torch.equal(layer.weight, best["weight"])
    layer.load_state_dict(best)
    run.finalize()
    assert torch.equal(layer.weight, best["weight"])


def test_a_warning_says_how_many_loaded_weights_are_rounded():
    layer, _, run = trained()
    layer.load_state_dict({"weight": gaussian(16, 32, seed=3)})
    with pytest.warns(UserWarning, match=r"'weight' were written .*: the new values become the latent weights, \d+ of them rounded"):
        run.health()


@pytest.mark.filterwarnings("ignore:.*outside the run")
@pytest.mark.parametrize("method", [sw.ste(Q), sw.lotion(Q, loss_terms=8)], ids=lambda method: method.name)
def test_weights_loaded_inside_deployed_stay(method):
    layer, _, run = trained(method)
    with run.deployed():
        layer.load_state_dict({"weight": torch.full((16, 32), 0.5)})
    assert torch.equal(layer.weight, torch.full((16, 32), 0.5))
    run.finalize()
    assert torch.equal(layer.weight, torch.full((16, 32), 0.5))


@pytest.mark.parametrize("method", [sw.parq(Q, slope=linear(1, 0, steps=4)), sw.sampled(Q)], ids=["parq", "sampled"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "no gradient"])
def test_a_weight_that_steps_leave_alone_follows_the_schedule(method, frozen):
    """A forward pass that changes with the step is no write from outside where a weight is frozen, or nobody has used it."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(32, 16, bias=False) for _ in range(2))
    model[0].weight.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW(model[frozen:].parameters(), lr=1e-2)
    before = model[0].weight.detach().clone()
    run = sw.attach(model, method, optimizer)
    first = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model[1], optimizer, 5)
        assert torch.equal(model[0].weight, Q(before)) or method.name == "sampled"
        assert not torch.equal(model[0].weight, first)
        with run.latent():
            assert torch.equal(model[0].weight, before)


def test_a_users_own_reshard_is_left_alone():
    """Looking asks FSDP2's modules to be shards again, and nobody else's."""
    layer, _, run = trained()
    layer.reshard = nn.Linear(2, 2)
    assert run.health().total.elements == 512


def test_a_replaced_parameter_is_refused_by_name():
    layer, _, run = trained()
    layer.load_state_dict({"weight": torch.ones(16, 32)}, assign=True)
    with pytest.raises(RuntimeError, match=r"'weight' is another parameter .* assign=True"):
        run.finalize()


def test_a_replaced_parameter_is_refused_at_the_next_step():
    """Else the run would train nothing and nobody would know before its end."""
    layer, optimizer, _ = trained()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    optimizer.zero_grad()
    layer.weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"'weight' is another parameter .* `fully_shard`"):
        optimizer.step()


def test_state_loaded_before_attach_is_refused_before_anything_changes():
    _, optimizer, _ = trained()
    saved = optimizer.state_dict()
    layer = nn.Linear(32, 16, bias=False)
    before = layer.weight.detach().clone()
    fresh = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    fresh.load_state_dict(saved)
    with pytest.raises(ValueError, match="Build, attach, load, in this order"):
        sw.attach(layer, sw.ste(Q), fresh)
    assert torch.equal(layer.weight, before)


def test_a_second_run_on_one_parameter_is_refused_by_name():
    layer, _, run = trained()
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'weight' already has a run: Run\(ste"):
        sw.attach(layer, sw.ste(Q), torch.optim.SGD(layer.parameters(), lr=0.1))
    assert torch.equal(layer.weight, before)
    run.detach()
    sw.attach(layer, sw.ste(Q), torch.optim.SGD(layer.parameters(), lr=0.1))


class Wrapper(torch.optim.Optimizer):
    """A wrapper that delegates, as accelerate's does: it never calls Optimizer.__init__."""

    def __init__(self, inner):
        self.optimizer = inner

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state


def test_an_optimizer_without_hooks_is_refused_before_anything_changes():
    layer = nn.Linear(32, 16)
    before = layer.weight.detach().clone()
    with pytest.raises(TypeError, match=r"Wrapper has no step hooks .*\.optimizer"):
        sw.attach(layer, sw.ste(Q), Wrapper(torch.optim.SGD(layer.parameters(), lr=0.1)))
    assert torch.equal(layer.weight, before)


def test_an_error_while_the_run_begins_restores_the_weights_and_removes_the_hooks():
    def fails(weight, context):
        raise RuntimeError("no") if weight.shape[0] == 8 else None
        return weight

    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sw.ste(sw.int2(block=16))
    broken = method._replace(deploy=lambda weight, context: fails(weight, context) or torch.zeros_like(weight))
    with pytest.raises(RuntimeError):
        sw.attach(model, {"0": method, "1": broken}, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks
    sw.attach(model, method, optimizer)  # nothing is left behind


@pytest.mark.filterwarnings("ignore:.*outside the run")
def test_inference_mode_around_loading_and_attach_does_no_harm():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    with torch.inference_mode():
        run = sw.attach(layer, sw.ste(Q), optimizer)
        layer.load_state_dict({"weight": gaussian(16, 32, seed=1)})
        with run.deployed():
            pass
    step(layer, optimizer, 2)
    assert run.steps == 2


@pytest.mark.parametrize("curvature", [lambda name: torch.ones(3), lambda name: None, lambda name: -torch.ones(16, 32)])
def test_a_curvature_function_is_asked_and_checked_at_attach(curvature):
    layer = nn.Linear(32, 16, bias=False)
    with pytest.raises(ValueError, match=r"`curvature` of 'weight' must be"):
        sw.attach(layer, sw.lotion(Q, curvature=curvature), torch.optim.SGD(layer.parameters(), lr=0.1))


def test_curvature_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"`curvature` must be a mapping or a function.*float"):
        sw.lotion(Q, curvature=1.0)


def test_l2_decay_inside_adam_warns_that_curvature_is_not_the_tasks():
    layer = nn.Linear(32, 16, bias=False)
    with pytest.warns(UserWarning, match=r"Adam adds weight_decay=0\.1 to the gradient of 1 parameters such as 'weight'"):
        sw.attach(layer, sw.lotion(Q, loss_terms=8), torch.optim.Adam(layer.parameters(), weight_decay=0.1))
    other = nn.Linear(32, 16, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sw.attach(other, sw.lotion(Q, loss_terms=8), torch.optim.AdamW(other.parameters(), weight_decay=0.1))
