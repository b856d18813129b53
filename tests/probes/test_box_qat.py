"""Training in a box and the float control, against loops in plain PyTorch, and on every kind of grid."""

import math

import pytest
import torch
from tests.cases import REPRESENTATIVES
from tests.probes.models import UNIT, Batch, Everything, Quadratic, normal, row
from torch import nn
from torch.func import functional_call

import stepwell as sw
from stepwell.formats import integer
from stepwell.probes.grid import grid
from stepwell.quantizers import Quantizer


class Round(torch.autograd.Function):
    """Integers in units of a fixed scale per row; identity backward."""

    @staticmethod
    def forward(ctx, weight, scale, top):
        return (weight / scale).round().clamp(-top, top) * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def small():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), normal(40, 6, seed=1), normal(40, 3, seed=2)
    return model, (lambda m: (m(x) - y).square().mean())


def plain_training(model, loss, forward, steps, lr):
    """Adam with a cosine on the two weights; `forward` makes of them what the model sees."""
    names = ["0.weight", "2.weight"]
    weights = {name: dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names}
    optimizer = torch.optim.Adam(weights.values(), lr=lr)
    seen = lambda: lambda x: functional_call(model, {name: forward(name, w) for name, w in weights.items()}, x)  # noqa: E731
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(seen()).backward()
        optimizer.step()
    return weights, loss(seen()).item()


def test_without_a_box_it_is_straight_through_training():
    model, loss = small()
    q, steps, lr = sw.intn(2, block="channel"), 60, 3e-2
    scales = {name: dict(model.named_parameters())[name].detach().abs().amax(1, keepdim=True) for name in ("0.weight", "2.weight")}
    weights, final = plain_training(model, loss, lambda name, w: Round.apply(w, scales[name], 1), steps, lr)
    found = sw.probes.box_qat(model, loss, around=q, steps=steps, lr=lr, reach=None)
    assert found.loss == pytest.approx(final, rel=1e-9)
    assert found.loss < found.before
    for name, weight in weights.items():
        assert torch.allclose(found.latent[name], weight.detach(), atol=1e-9)
    assert [step for step, _ in found.history] == [0, 1, 2, 4, 8, 16, 32, 60]
    assert found.cost == (2 + 60 + 8 + 1, 60)


def test_control_is_plain_training_and_rounding():
    model, loss = small()
    q, steps, lr = sw.intn(3, block="channel"), 40, 3e-2
    weights, trained = plain_training(model, loss, lambda name, w: w, steps, lr)
    found = sw.probes.control(model, loss, around=q, steps=steps, lr=lr)
    assert found.trained == pytest.approx(trained, rel=1e-9)
    start = dict(model.named_parameters())
    scales = {name: start[name].detach().abs().amax(1, keepdim=True) / 3 for name in weights}
    frozen = {name: (w.detach() / scales[name]).round().clamp(-3, 3) * scales[name] for name, w in weights.items()}
    assert found.loss == pytest.approx(loss(lambda x: functional_call(model, frozen, x)).item(), rel=1e-9)
    fitted = {name: q(w.detach()) for name, w in weights.items()}
    assert found.refitted == pytest.approx(loss(lambda x: functional_call(model, fitted, x)).item(), rel=1e-9)
    assert found.removed == pytest.approx((found.before - found.loss) / (found.before - found.start))
    assert found.final == found.loss


@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_codes_stay_in_the_box_and_reach_its_ends(quantizer):
    # every weight is pulled up or down without end: all codes must end one step in that direction, or at the end of the range
    model = nn.Linear(64, 2, bias=False).double()
    model.weight.data = normal(2, 64, seed=0)
    target = sw.probes.rounded(model, quantizer)["weight"]
    held, pull = grid(target, model.weight.detach()), normal(2, 64, seed=1).sign()
    found = sw.probes.box_qat(model, lambda m: -(pull * m.weight).sum(), around={"weight": target}, steps=40, lr=1.0)
    before, after = held.indices(target), held.indices(found.found["weight"])
    assert (after - before).abs().max() <= 1
    gained = (held.value(after) - held.value(before)) * pull
    best = torch.maximum(*((held.value((before + side).clamp(0, held.top)) - held.value(before)) * pull for side in (-1, 1)))
    assert torch.equal(gained, best.clamp(min=0))
    assert torch.equal(held.round(found.latent["weight"]), found.found["weight"].decode())


def test_recovers_where_rounding_leaves_the_basin():
    # Case A: rounding to (0, 0) is .25 beyond the basin, (1, 0) is inside. Adam's first two steps of .05 carry .42 over the threshold.
    # Its momentum carries the weights on, so a later step is outside again: first entry is no permanence.
    side, centre = 0.5**0.5, torch.tensor([0.42, 0.36], dtype=torch.float64)
    loss = lambda m: ((m.weight[0] - centre).sum().abs() * side - 0.3).clamp(min=0)  # noqa: E731
    found = sw.probes.box_qat(row(centre), loss, around=UNIT, steps=20, lr=0.05, tolerance=0.01)
    assert found.before == pytest.approx(0.251543, abs=1e-6)
    assert (found.entry, dict(found.history)[2]) == (2, 0.0)
    assert dict(found.history)[4] > 0.01


def test_training_batches_and_held_out_data_are_the_callers():
    seen, batch, other = [], Batch(), Batch(seed=5)

    def train(model, step):
        seen.append((step, model.training))
        return batch(model.train())  # what training functions do; the probe's own loss must not see it

    model = Everything()
    found = sw.probes.box_qat(model, Batch(), around=sw.int2(block="channel"), train=train, held_out=other, steps=5)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert other.calls == 2
    assert found.held_out != found.held_out_before
    assert found.final != found.loss  # BatchNorm statistics re-estimated
    assert not math.isnan(found.held_out)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1.5}, {"lr": 0}, {"lr": float("nan")}, {"reach": 0}, {"tolerance": 0}])
def test_options_out_of_range_are_refused(options):
    loss = Quadratic(torch.eye(1), torch.zeros(1))
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        sw.probes.box_qat(row([0.4]), loss, around=UNIT, **options)
    if "reach" not in options and "tolerance" not in options:
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            sw.probes.control(row([0.4]), loss, around=UNIT, **options)
    assert loss.calls == 0


def test_a_step_without_a_finite_gradient_is_left_out():
    """Rounding takes the smaller weight to 0, where 1 / |w| is infinite: no step can be made, and the weights stay what they were."""
    layer = row([1.0, 0.2])
    found = sw.probes.box_qat(layer, lambda model: 1 / model.weight.abs().min(), around=Quantizer(integer(2), rule=1.0), steps=4)
    assert (found.before, found.loss, found.within, found.changed) == (math.inf, math.inf, False, 0.0)
    assert torch.equal(found.latent["weight"], layer.weight)
