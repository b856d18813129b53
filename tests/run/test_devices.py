"""Steps on another device than the CPU, without having one: meta tensors refuse to meet the CPU's, and to be read back, as a GPU should.

What a tensor is made of is not looked at here: kernels for a GPU's numbers are compared on one, by `benchmarks/gpu/updates.py`.
"""

import pytest
import torch
from tests.cases import METHODS
from torch import nn

import stepwell as sw
from stepwell import shrink
from stepwell.methods import learned
from stepwell.run import check, notices, passes
from stepwell.run.managed import SCALE

DEVICE = torch.device("meta")
GRIDS = {
    "int4": sw.int4(block=16),
    "fp16": sw.intn(4, block=16, levels="full", scale_dtype="fp16"),
    "affine": sw.intn(3, block=16, levels="affine"),
    "searched": sw.intn(3, block=16, scale="mse"),
    "tensor": sw.intn(8, block=None),
    "nvfp4": sw.nvfp4(),
}


class Weight(nn.Parameter):
    """A parameter that does not say that it is on the meta device, where `attach` finds nothing to train."""

    is_meta = False


class Fused(torch.optim.AdamW):
    """Keeps its state as torch's fused AdamW does on a GPU: the count of steps beside the weight."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"].add_(1)
                weight.addcdiv_(state["exp_avg"].lerp_(weight.grad, 0.1), state["exp_avg_sq"].sqrt(), value=-group["lr"])


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """Leave out what reads weights back on purpose, when a run begins or now and then: checks, warnings, and the end of a search."""
    monkeypatch.setattr(check, "check_weight", lambda weight, name: None)
    monkeypatch.setattr(notices, "watch", lambda run, managed: None)
    monkeypatch.setattr(shrink, "LOOKS", ())
    monkeypatch.setattr(learned, "_searched", lambda weight, quantizer: {SCALE: quantizer.fit(weight).scale})


def stepped(method, made):
    """Return the run after two steps on the device, scales that are searched searched again after the second."""
    layer = nn.Linear(32, 48, bias=False, device=DEVICE)
    layer.weight = Weight(layer.weight.detach())
    optimizer = made(layer.parameters(), lr=1e-3)
    run = sw.attach(layer, method, optimizer, compile=False, refit=2)
    for _ in range(2):
        layer.weight.grad = torch.empty_like(layer.weight)
        optimizer.step()
    return run


def stays(name, grid, made):
    """Step a method on a grid, where it can be built, and look where everything lies that the run holds."""
    try:
        method = METHODS[name](GRIDS[grid])
    except ValueError:
        return
    for one in stepped(method, made)._managed:
        held = [one.weight, one.latent, one.reach, *one.tensors.values(), *(one.fit or ())]
        assert {tensor.device for tensor in held if tensor is not None} == {DEVICE}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_stays_on_its_device_and_reads_nothing_back(name):
    stays(name, "int4", Fused)


@pytest.mark.slow
@pytest.mark.parametrize("made", [torch.optim.AdamW, Fused], ids=["foreach", "fused"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_step_on_every_grid_does(name, grid, made):
    stays(name, grid, made)


def test_weights_are_cut_for_the_cache_of_a_cpu_alone(monkeypatch):
    """Every piece is thirty operations more to start, which on a GPU cost more than a pass over memory."""
    monkeypatch.setattr(passes, "PIECE", 16 * 4)
    rows = []

    def deploy(weight, context):
        rows.append(len(weight))
        return weight.clone()

    stepped(sw.ste(GRIDS["int4"])._replace(deploy=deploy), torch.optim.AdamW)
    assert set(rows) == {48 * 32 // 16}


def test_what_meets_the_cpu_or_is_read_back_is_seen():
    """The means of the test above, on methods that do it."""

    def mixed(weight, context):
        return weight + torch.ones(weight.shape[1])

    def read(weight, context):
        return weight * float(weight.abs().max())

    for deploy, said in ((mixed, "device"), (read, "meta tensors")):
        with pytest.raises(RuntimeError, match=said):
            stepped(sw.ste(GRIDS["int4"])._replace(deploy=deploy), torch.optim.AdamW)
