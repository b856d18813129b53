"""What all probes share: the model is left exactly as found, passes are counted, memory is bounded, bad input is refused first."""

import copy

import pytest
import torch
from tests.held import Held
from tests.probes.models import UNIT, Batch, Everything, Quadratic, normal, row
from torch import nn
from torch.nn import functional

import stepwell as sw
from stepwell.probes.stage import staged

Q = sw.int3(block="channel")


def shrunk(model: nn.Module):
    """Other weights for those that are quantized, 10 % smaller, rounded so that they cost no tensor of their own."""
    smaller = copy.deepcopy(model)
    for parameter in smaller.parameters():
        parameter.data *= 0.9
    return sw.probes.rounded(smaller, sw.int8(block="channel"))


PROBES = {
    "segment": lambda model, loss: sw.probes.segment(model, loss, toward=Q),
    "width": lambda model, loss: sw.probes.width(model, loss, toward=Q, tolerance=0.01),
    "rho_uniform": lambda model, loss: sw.probes.rho_uniform(model, loss, toward=Q, draws=2),
    "rho_fn": lambda model, loss: sw.probes.rho_fn(model, loss, toward=Q),
    "rho_cross": lambda model, loss: sw.probes.rho_cross(model, loss, toward=Q, coarse=sw.int2(block="channel")),
    "rho_layers": lambda model, loss: sw.probes.rho_layers(model, loss, toward=Q),
    "inward": lambda model, loss: sw.probes.inward(model, loss, at=Q),
    "quadratic": lambda model, loss: sw.probes.quadratic(model, loss, toward=Q),
    "exact_quadratic": lambda model, loss: sw.probes.exact_quadratic(model, loss, toward=Q),
    "plane": lambda model, loss: sw.probes.plane(model, loss, toward=Q, across=shrunk(model), size=2),
    "latent": lambda model, loss: sw.probes.latent(model, loss, at=Q, start=shrunk(model)),
    "box_qat": lambda model, loss: sw.probes.box_qat(model, loss, around=Q, steps=3, held_out=loss),
    "control": lambda model, loss: sw.probes.control(model, loss, around=Q, steps=3),
    "neighbours": lambda model, loss: sw.probes.neighbours(model, loss, around=Q, held_out=loss, rounds=4),
}
every_probe = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)


def prepared() -> Everything:
    """A model in the middle of training: gradients, mixed modes, a frozen layer."""
    model = Everything().train()
    model.frozen.eval()
    Batch(seed=3)(model).backward()
    return model


def fingerprint(model: nn.Module):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.data_ptr(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return tensors, flags, [module.training for module in model.modules()], model.norm.momentum


def assert_same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    for (asked, place, grad), (asked_now, place_now, grad_now) in zip(one[1], other[1], strict=True):
        assert (asked, place) == (asked_now, place_now)
        assert (grad is None and grad_now is None) or torch.equal(grad, grad_now)
    assert one[2:] == other[2:]


@every_probe
def test_model_is_left_exactly_as_found(probe):
    model = prepared()
    before = fingerprint(model)
    probe(model, Batch())
    assert_same(before, fingerprint(model))


@every_probe
@pytest.mark.parametrize("last", [1, 2, 3])
def test_model_is_left_as_found_when_the_loss_breaks_down(probe, last):
    model, batch = prepared(), Batch()
    before = fingerprint(model)

    def breaking(model):
        if batch.calls == last:
            raise RuntimeError("no more data")
        return batch(model)

    with pytest.raises(RuntimeError, match="no more data"):
        probe(model, breaking)
    assert_same(before, fingerprint(model))


@every_probe
def test_cost_is_what_was_spent(probe):
    batch = Batch()
    cost = probe(Everything(), batch).cost
    assert cost == (batch.calls, batch.backwards + (probe is PROBES["exact_quadratic"]))  # the gradient's derivative is no pass of the loss


# Copies of the weights that a probe makes beside the model's own, gradients included; codes are a quarter of one. `rho_layers` is `width`
# once per tensor. To these come temporaries of one layer at a time, a dozen tensors, and the activations of a single sample.
COPIES = {
    **dict.fromkeys(("segment", "width", "rho_uniform", "inward", "quadratic"), 1 + 0.25),
    "rho_fn": 1,  # the codes that gave the distance are gone before the copy is made
    "rho_cross": 1 + 2 * 0.25,
    "plane": 1 + 2 * 0.25,
    "latent": 1 + 2 * 0.25,
    "neighbours": 1 + 2 * 0.25 + 4 * 0.15,  # where it begins, how far codes moved; a twentieth of all steps, as float32 and int64, sorted
    "box_qat": 5 + 2 * 0.25,  # the copy, latent weights, gradient, two moments; where it begins and where it ends
    "control": 5 + 0.25,
}
FRUGAL = {
    "rho_uniform": lambda model, loss: sw.probes.rho_uniform(model, loss, toward=Q, draws=1),
    "neighbours": lambda model, loss: sw.probes.neighbours(model, loss, around=Q, rounds=1),
    "box_qat": lambda model, loss: sw.probes.box_qat(model, loss, around=Q, steps=2),
}
LAYERS, WIDTH = 32, 40


@pytest.mark.parametrize(("name", "copies"), COPIES.items())
def test_memory_is_one_copy_of_the_weights_unless_a_probe_trains(name, copies):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    x = normal(1, WIDTH, seed=0).float()
    with Held() as held:
        FRUGAL.get(name, PROBES[name])(model, lambda model: (model(x) - x).square().mean())
    assert held.peak / (4 * LAYERS * WIDTH**2) <= copies + 12 / LAYERS


REFUSALS = {
    "no function": ("`loss` must be a function", TypeError, 3.0),
    "a number": ("must return a tensor", TypeError, lambda m: 1.0),
    "per sample": (r"scalar: got shape \(24,\)", ValueError, lambda m: functional.cross_entropy(m(Batch().x), Batch().y, reduction="none")),
    "not finite": ("finite.*inf", ValueError, lambda m: m.head.weight.sum() * torch.inf),
    "no data": ("finite.*nan.*empty", ValueError, lambda m: m(torch.zeros(0, 1, 3, 3)).mean()),
    "dropout": ("Dropout left on", ValueError, lambda m: functional.dropout(m.head.weight, 0.5).square().sum()),
    "new batches": ("drawn anew", ValueError, lambda m: m(torch.randn(4, 1, 3, 3)).square().mean()),
    "training mode": ("training mode.*dropout", ValueError, lambda m: m.train()(Batch().x).square().mean()),
}


@every_probe
@pytest.mark.parametrize(("text", "kind", "loss"), REFUSALS.values(), ids=REFUSALS)
def test_bad_loss_is_refused_and_nothing_changes(probe, text, kind, loss):
    model = prepared()
    before = fingerprint(model)
    with pytest.raises(kind, match=text):
        probe(model, loss)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("name", ["inward", "neighbours", "quadratic", "exact_quadratic", "box_qat", "control"])
def test_loss_without_a_graph_is_refused(name):
    batch = Batch()
    with pytest.raises(ValueError, match="differentiable"):
        PROBES[name](Everything(), lambda model: batch(model).detach())


@every_probe
def test_model_without_quantizable_parameters_is_refused(probe):
    with pytest.raises(ValueError, match="nothing is selected"):
        probe(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), lambda m: m[1].weight.sum())


POINTS = {
    "empty": ({}, ValueError, "at least one weight"),
    "kind": (3, TypeError, "Quantizer or a mapping"),
    "name": ({"body": torch.zeros(1, 2)}, ValueError, "'body'.*no parameter"),
    "shape": ({"weight": torch.zeros(2, 2)}, ValueError, r"shape \(2, 2\)"),
    "value": ({"weight": [0.0, 0.0]}, TypeError, "got list"),
    "infinite": ({"weight": torch.tensor([[torch.inf, 0.0]])}, ValueError, "finite"),
}


@pytest.mark.parametrize(("point", "kind", "text"), POINTS.values(), ids=POINTS)
def test_points_that_do_not_fit_are_refused(point, kind, text):
    loss = Quadratic(torch.eye(2), torch.zeros(2))
    for probe in (sw.probes.segment, sw.probes.width, sw.probes.rho_fn):
        with pytest.raises(kind, match=text):
            probe(row([0.4, 0.3]), loss, toward=point)
    with pytest.raises(kind, match=text):
        sw.probes.inward(row([0.4, 0.3]), loss, at=point)
    assert loss.calls == 0


@pytest.mark.parametrize("tolerance", [0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_tolerance_must_be_positive(tolerance):
    loss, model = Quadratic(torch.eye(2), torch.zeros(2)), row([0.4, 0.3])
    for probe in (sw.probes.width, sw.probes.rho_self, sw.probes.rho_uniform, sw.probes.rho_fn, sw.probes.rho_layers):
        with pytest.raises(ValueError, match="`tolerance` must be a positive number"):
            probe(model, loss, toward=UNIT, tolerance=tolerance)
    with pytest.raises(ValueError, match="`tolerance`"):
        sw.probes.neighbours(model, loss, around=UNIT, tolerance=tolerance)
    with pytest.raises(ValueError, match="`tolerance`"):
        sw.probes.inward(model, loss, at=UNIT, tolerance=tolerance)
    assert loss.calls == 0


def test_slices_use_frozen_statistics_and_final_numbers_those_of_the_data():
    # One BatchNorm after one product: y = (z - mean) / sqrt(var + eps), with the running statistics in the slice and those of the data's
    # own z at the end (var unbiased: n / (n - 1) times the population variance, as PyTorch stores it). Written out here by hand.
    x, y = normal(50, 6, seed=0), normal(50, 3, seed=1)
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3)).double()
    model[0].weight.data, model[1].running_var[:] = normal(3, 6, seed=2), 4.0
    model[1].running_mean[:] = 0.3
    model.train()

    def by_hand(weight, mean, var):
        return ((x @ weight.T - mean) / (var + 1e-5).sqrt() - y).square().mean().item()

    rounded = sw.probes.rounded(model, Q)["0.weight"].decode()
    line = sw.probes.segment(model, lambda m: (m(x) - y).square().mean(), toward=Q)
    z = x @ rounded.T
    four = torch.full((3,), 4.0, dtype=torch.float64)
    assert line.losses[10] == pytest.approx(by_hand(rounded, 0.3, four), rel=1e-12)
    assert line.losses[0] == pytest.approx(by_hand(model[0].weight.detach(), 0.3, four), rel=1e-12)
    assert line.final == pytest.approx(by_hand(rounded, z.mean(0), z.var(0)), rel=1e-12)
    assert line.final != pytest.approx(line.losses[10], rel=0.05)


def test_statistics_are_averaged_over_the_batches_of_the_loss():
    x = normal(60, 4, seed=0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2, momentum=0.9)).double()
    seen = []

    def loss(m):
        seen.append((m[1].running_mean.clone(), m[1].training))
        return sum(m(part).square().mean() for part in x.split(20)) / 3

    with staged(model, loss, ["0.weight"]) as stage:
        stage.settled()
    # equal batches: the average of their means is the mean of all
    assert torch.allclose(seen[-1][0], (x @ model[0].weight.T).mean(0), atol=1e-14)
    assert [training for _, training in seen] == [False, False, True, False]
    assert model[1].momentum == 0.9


def test_a_run_in_progress_is_not_disturbed():
    def trained(log):
        model = Everything(seed=4)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        run = sw.attach(model, {"conv": sw.ste(Q), "head": sw.ste(Q), "*": None}, optimizer)
        start, batch = {name: p.detach().clone() for name, p in model.named_parameters()}, Batch()
        for _ in range(6):
            model.train()
            optimizer.zero_grad()
            torch.manual_seed(0)
            batch(model).backward()
            optimizer.step()
            if log:
                reference = ("conv.weight", "head.weight")
                with run.latent():
                    at = {name: Q.encode(dict(model.named_parameters())[name]) for name in reference}
                    point = sw.probes.inward(model, batch, at=at, toward=start)
                    assert point.distance > 0
        return run.finalize(), model.state_dict()

    plain, logged = trained(False), trained(True)
    assert all(torch.equal(plain[0][name].codes, logged[0][name].codes) for name in plain[0])
    assert all(torch.equal(plain[1][name], logged[1][name]) for name in plain[1])


def test_tied_and_own_weights_are_handled():
    model = row([0.4, 1.3])
    model.twin = nn.Linear(2, 1, bias=False)
    model.twin.weight = model.weight
    loss = lambda m: m.weight.square().sum()  # noqa: E731
    line = sw.probes.segment(model, loss, toward={"weight": torch.zeros(1, 2), "twin.weight": torch.zeros(1, 2)})
    assert line.losses[10] == 0
    own = sw.probes.segment(model, loss, toward={"weight": torch.zeros(1, 2)}, start={"weight": model.weight})
    assert own.losses == line.losses
