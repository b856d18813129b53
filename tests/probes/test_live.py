"""A log of a training run: what it sees, and that the run does not see it."""

import copy
import csv
import json
import math

import pytest
import torch
from tests.probes.models import UNIT, Batch, Everything, Quadratic, row
from tests.run.resume_worker import CASES, build
from tests.run.training import batches, network, same, train, weights
from torch.nn.functional import mse_loss

import stepwell as sw
from stepwell.probes.look import Look

Q = sw.int3(block=16)


def probe(dtype=torch.float32):
    """A loss on data that training does not see."""
    inputs, targets = batches(1, seed=7, dtype=dtype)[0]
    return lambda model: mse_loss(model(inputs), targets)


def started(method=None, *, seed=0, lr=0.05):
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, sw.attach(model, sw.ste(Q) if method is None else method, optimizer)


def state(model, optimizer):
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()})


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# What it sees.


def test_a_run_worked_out_by_hand():
    # b = (.4, 2.6), r = (0, 3); L = |x - c|^2 / 2, c = (1, 2), so the gradient at r is (-1, 1). SGD with rate .5: w = (.9, 2.1), q = (1, 2)
    model = row([0.4, 2.6])
    loss = Quadratic(torch.eye(2), torch.tensor([1.0, 2.0]), offset=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run = sw.attach(model, sw.ste(UNIT), optimizer)
    log = sw.probes.Log(run, loss, tolerance=0.3)
    loss(model).backward()
    optimizer.step()
    first, second = log.looks
    assert (log.start, log.rounded) == pytest.approx(((0.36 + 0.36) / 2, 1.0))
    assert (first.step, first.loss, first.latent_loss, first.best, first.outside) == (0, 1.0, pytest.approx(0.36), 1.0, True)
    # back = b - r = (.4, -.4), downhill at r is (1, -1), at w = b it is (.6, -.6)
    assert (first.cosine, first.latent_cosine, first.projection) == pytest.approx((1.0, 1.0, math.sqrt(2)))
    assert (first.changed, first.near, first.steps_moved, first.farthest) == (0.0, 1.0, 0.0, 0)
    assert (first.distance, first.rounded_distance, first.latent_distance) == pytest.approx((math.sqrt(0.32), math.sqrt(0.32), 0.0))
    assert math.isnan(first.compensation)
    assert (first.off_grid, first.clipped, first.finite) == (pytest.approx(0.4), 0.0, True)
    assert (second.step, second.loss, second.best, second.outside) == (1, 0.0, 0.0, False)
    assert second.latent_loss == pytest.approx((0.01 + 0.01) / 2)
    assert math.isnan(second.cosine)  # the minimum is on the grid: no gradient there
    assert (second.changed, second.near, second.steps_moved, second.farthest) == (1.0, 1.0, 1.0, 1)
    assert second.compensation == pytest.approx(1.0)  # w - b = (.5, -.5) against r - b = (-.4, .4)
    assert (second.distance, second.rounded_distance, second.latent_distance) == pytest.approx(
        (math.sqrt(0.72), math.sqrt(0.32), math.sqrt(0.5))
    )
    assert (second.flips, second.dead) == (1.0, 0.0)
    assert (log.entry, log.best) == (1, second)


@pytest.mark.parametrize(
    "method",
    [sw.ste(Q), sw.lotion(Q, loss_terms=64), sw.ste(sw.nvfp4()), sw.ste(sw.intn(3, block=16, scale="mse"))],
    ids=lambda method: method.name,
)
def test_a_look_is_what_the_probes_say(method):
    model, optimizer, run = started(method)
    before = copy.deepcopy(network().state_dict())
    log = sw.probes.Log(run, probe(), reference=before)
    train(model, optimizer, batches(8))
    health = run.health().total
    look, at = log.looks[-1], run.encoded()
    with run.latent():
        inward = sw.probes.inward(model, probe(), at=at, toward=before, baseline=log.start)
        latent = sw.probes.latent(model, probe(), at=at, start=before)
    assert look.step == 8
    with torch.no_grad():
        assert log.start == probe()(network()).item()  # the biases of now have moved on
    for key in ("loss", "latent_loss", "cosine", "latent_cosine", "projection", "outside", "changed"):
        assert getattr(look, key) == getattr(inward, key), key
    for key in ("near", "farthest", "compensation", "distance", "rounded_distance", "latent_distance"):
        assert getattr(look, key) == getattr(latent, key), key
    assert (look.clipped, look.off_grid) == pytest.approx((health.clipped, health.distance), rel=1e-6)


def test_flips_are_those_since_the_look_before():
    model, optimizer, run = started()
    log, codes = sw.probes.Log(run, probe(), every=2), []
    for batch in batches(6):
        codes.append(torch.cat([one.codes.flatten() for one in run.encoded().values()]))
        run.health()  # the run's own count, which has nothing to do with the log's
        train(model, optimizer, [batch])
    codes.append(torch.cat([one.codes.flatten() for one in run.encoded().values()]))
    for number, look in enumerate(log.looks[1:], start=1):
        now, last = codes[2 * number], codes[2 * number - 2]
        assert look.flips == pytest.approx((now != last).double().mean().item())
        if number > 1:
            back = (now != last) & (now == codes[2 * number - 4])
            assert look.oscillation == pytest.approx(back.double().mean().item())
    assert log.looks[-1].flips > 0


def test_entry_best_and_stay():
    model, _, run = started()
    log = sw.probes.Log(run, probe())
    first = log.looks[0]

    def with_loss(step, loss):
        numbers = {**sw.probes.look.row(first), "step": step, "loss": loss, "outside": loss > log.start + 0.1}
        return sw.probes.look.from_row(numbers)

    log._looks = [with_loss(step, log.start + above) for step, above in ((0, 0.5), (1, 0.2), (2, 0.05), (4, 0.3), (8, 0.02), (16, 0.08))]
    assert log.entry == 2
    assert log.best.step == 8
    assert log.stay == pytest.approx(2 / 3)
    log._looks = log._looks[:2]
    assert log.entry is None
    assert math.isnan(log.stay)
    del model


def test_contrast_takes_looks():
    model, optimizer, run = started()
    log = sw.probes.Log(run, probe(), tolerance=1e-3)
    train(model, optimizer, batches(16))
    found = sw.probes.contrast(log.looks)
    assert found.points == len(log.looks) == 6
    assert found.outside == sum(look.outside for look in log.looks)


# When it looks.


def test_it_looks_at_powers_of_two_and_at_the_end():
    model, optimizer, run = started()
    seen = []
    log = sw.probes.Log(run, probe(), on_look=seen.append)
    train(model, optimizer, batches(11))
    run.finalize()
    assert [look.step for look in log.looks] == [0, 1, 2, 4, 8, 11]
    assert tuple(seen) == log.looks
    assert log.looks[-1].loss == probe()(model).item()  # what finalize left


@pytest.mark.parametrize("end", [lambda run: run.detach(), lambda run: run.finalize(), lambda run: None])
def test_it_looks_every_so_many_steps(end):
    model, optimizer, run = started()
    log = sw.probes.Log(run, probe(), every=3)
    train(model, optimizer, batches(6))
    end(run)
    assert [look.step for look in log.looks] == [0, 3, 6]


def test_a_look_on_demand_is_taken_once_per_step_and_close_ends_the_others():
    model, optimizer, run = started()
    log = sw.probes.Log(run, probe(), every=100)
    train(model, optimizer, batches(5))
    assert log() is log()
    log.close()
    train(model, optimizer, batches(200)[5:])
    run.finalize()
    assert [look.step for look in log.looks] == [0, 5]


def test_it_waits_for_all_optimizers():
    # both rates: one look per round; the second optimizer has stepped when it comes
    model = network()
    named = dict(model.named_parameters())
    first = torch.optim.SGD([named["0.weight"], named["0.bias"]], lr=0.1)
    second = torch.optim.AdamW([value for name, value in named.items() if not name.startswith("0.")], lr=0.05)
    run = sw.attach(model, sw.ste(Q), [first, second])
    log, after = sw.probes.Log(run, probe(), every=1), []
    for batch in batches(4):
        train(model, [first, second], [batch])
        with run.deployed(), torch.no_grad():
            after.append(probe()(model).item())
    assert [look.step for look in log.looks] == [0, 1, 2, 3, 4]
    assert [look.loss for look in log.looks[1:]] == after


def test_optimizers_that_step_at_different_rates():
    model = network()
    named = dict(model.named_parameters())
    often = torch.optim.SGD([named["0.weight"]], lr=0.1)
    seldom = torch.optim.SGD([value for name, value in named.items() if name != "0.weight"], lr=0.1)
    run = sw.attach(model, sw.ste(Q), [often, seldom])
    log = sw.probes.Log(run, probe(), every=1)
    for number, batch in enumerate(batches(6), start=1):
        train(model, [often] if number % 3 else [often, seldom], [batch])
    assert [look.step for look in log.looks] == list(range(7))


def test_skipped_steps_and_inner_calls_are_no_steps():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = network()
    optimizer = Twice(model.parameters(), lr=0.05)
    run = sw.attach(model, sw.ste(Q), optimizer)
    log = sw.probes.Log(run, probe(), every=1)
    for inputs, targets in batches(3):

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert [look.step for look in log.looks] == [0, 1, 2, 3]


# That the run does not see it.


@pytest.mark.parametrize("case", CASES)
def test_every_method_ends_with_the_same_bits(case):
    ends = []
    for logged in (False, True):
        model, optimizer, run = build(case, seed=0)
        if logged:
            log = sw.probes.Log(run, probe(), every=1)
        train(model, optimizer, batches(6))
        ends.append(state(model, optimizer))
        assert not logged or [look.step for look in log.looks] == list(range(7))
        ends[-1]["codes"] = {name: one.codes for name, one in run.finalize().items()}
    assert equal(*ends)


def test_the_compiled_path_ends_with_the_same_bits():
    ends = []
    for logged in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        run = sw.attach(model, sw.lotion(Q, loss_terms=64, forward="nearest"), optimizer, compile=True)
        log = sw.probes.Log(run, probe(), every=2) if logged else None
        train(model, optimizer, batches(5))
        ends.append(state(model, optimizer))
        assert log is None or len(log.looks) == 3
    assert equal(*ends)


def test_batchnorm_dropout_modes_and_randomness_are_left_alone():
    data, ends = Batch(), []
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=8)  # reading it draws a seed

    def loss(model):
        return sum(torch.nn.functional.cross_entropy(model(x), y) for x, y in loader) / len(loader)

    for logged in (False, True):
        torch.manual_seed(3)
        model = Everything()
        model.conv.eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = sw.attach(model, sw.ste(sw.int3(block="channel")), optimizer)
        log = sw.probes.Log(run, loss, every=1) if logged else None
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data.x), data.y).backward()  # in training mode: dropout, batch statistics
            optimizer.step()
        assert [module.training for module in model.children()] == [False, True, True, True, True]
        assert not model.frozen.weight.requires_grad
        ends.append(state(model, optimizer))
        assert log is None or len({look.loss for look in log.looks}) == 6
    assert equal(*ends)


def test_gradients_that_accumulate_are_left_alone():
    ends, grads = [], []
    for logged in (False, True):
        model, optimizer, run = started()
        log = sw.probes.Log(run, probe(), every=100) if logged else None
        optimizer.zero_grad()
        for number, (inputs, targets) in enumerate(batches(4)):
            mse_loss(model(inputs), targets).backward()
            if logged and number == 1:
                held = {name: parameter.grad for name, parameter in model.named_parameters()}
                before = {name: grad.clone() for name, grad in held.items()}
                log._looks.clear()  # step 0 has been seen: look again
                log()
                assert same(held, before)
                assert all(parameter.grad is held[name] for name, parameter in model.named_parameters())
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
        ends.append(state(model, optimizer))
    assert same(*grads)
    assert equal(*ends)


def test_a_logged_run_resumes_and_its_log_goes_on(tmp_path):
    data, options = batches(12), {"every": 2}
    model, optimizer, run = started()
    whole = sw.probes.Log(run, probe(), **options)
    train(model, optimizer, data[:5])
    file = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": whole.state_dict()}, file)
    train(model, optimizer, data[5:])

    again, optimizer_again, run_again = started(seed=1)
    log = sw.probes.Log(run_again, probe(), **options)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    optimizer_again.load_state_dict(saved["optimizer"])
    log.load_state_dict(saved["log"])
    train(again, optimizer_again, data[5:])
    assert same(weights(model), weights(again))
    assert (log.start, log.rounded) == (whole.start, whole.rounded)
    begin_anew = dict.fromkeys(("flips", "oscillation", "dead"), 0.0)
    for one, other in zip(log.rows(), whole.rows(), strict=True):
        assert {**one, **begin_anew} == pytest.approx({**other, **begin_anew}, rel=0, abs=0, nan_ok=True)


def test_a_run_resumes_without_its_log():
    data = batches(8)
    model, optimizer, run = started()
    sw.probes.Log(run, probe())
    train(model, optimizer, data[:4])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[4:])
    again, optimizer_again, _ = started(seed=1)
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    train(again, optimizer_again, data[4:])
    assert same(weights(model), weights(again))
    del run


def test_cost_is_two_and_two():
    model, optimizer, run = started()
    calls = []

    def loss(model):
        calls.append(torch.is_grad_enabled())
        return probe()(model)

    log = sw.probes.Log(run, loss, every=1)
    calls.clear()
    train(model, optimizer, batches(3))
    assert calls == [True] * 6
    assert [look.cost for look in log.looks] == [(2, 2)] * 4


def test_weights_that_are_no_numbers_are_seen_and_stop_nothing(tmp_path):
    model, optimizer, run = started(lr=0.05)
    log = sw.probes.Log(run, probe(), every=1)
    inputs, targets = batches(1)[0]
    train(model, optimizer, [(inputs, targets), (inputs * math.inf, targets)])
    train(model, optimizer, [(inputs, targets)])
    assert [look.finite for look in log.looks] == [True, True, False, False]
    assert math.isnan(log.looks[-1].loss)
    assert log.best.step < 2
    log.json(tmp_path / "log.json")
    assert json.loads((tmp_path / "log.json").read_text())["looks"][3]["loss"] is None


# What is written down.


def test_tables_hold_every_number(tmp_path):
    model, optimizer, run = started()
    log = sw.probes.Log(run, probe())
    train(model, optimizer, batches(4))
    log.csv(tmp_path / "log.csv")
    log.json(tmp_path / "log.json")
    rows = log.rows()
    with (tmp_path / "log.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in read] == [look.loss for look in log.looks]
    assert list(read[0]) == list(rows[0])
    whole = json.loads((tmp_path / "log.json").read_text())
    assert whole["start"] == log.start
    assert [line["cosine"] for line in whole["looks"]] == [look.cosine for look in log.looks]
    assert whole["looks"][0]["flips"] is None  # not a number before a second look
    assert len(str(log).splitlines()) == 1 + len(rows) + 1
    assert sw.probes.look.from_row(rows[-1]) == log.looks[-1]
    with pytest.raises(AttributeError):
        log.looks[0].loss = 0.0
    assert set(rows[0]) == {*Look.__dataclass_fields__, "forward", "backward"} - {"cost"}


# What it refuses.


def test_what_cannot_be_logged_is_refused_before_anything_hangs_on_the_run():
    model, optimizer, run = started()
    good = probe()
    shown = weights(model)
    for error, match, options in (
        (ValueError, "`every`", {"every": 0}),
        (ValueError, "`every`", {"every": True}),
        (ValueError, "`tolerance`", {"tolerance": 0.0}),
        (TypeError, "`on_look`", {"on_look": 3}),
        (ValueError, "`reference` must hold every weight", {"reference": {"0.weight": torch.zeros(48, 32)}}),
        (ValueError, "moves with training", {"reference": model.state_dict()}),
    ):
        with pytest.raises(error, match=match):
            sw.probes.Log(run, good, **options)
    with pytest.raises(ValueError, match="same number for the same weights"):
        sw.probes.Log(run, lambda model: good(model) + torch.rand(()))
    with pytest.raises(ValueError, match="differentiable"):
        sw.probes.Log(run, lambda model: good(model).detach())
    with pytest.raises(TypeError, match="`run`"):
        sw.probes.Log(model, good)
    assert same(weights(model), shown)
    train(model, optimizer, batches(1))
    assert not run._rounds._watchers
    run.finalize()
    with pytest.raises(RuntimeError, match="has ended"):
        sw.probes.Log(run, good)


def test_a_saved_reference_of_another_model_is_refused():
    model, _, run = started()
    log = sw.probes.Log(run, probe())
    kept = log.state_dict()
    with pytest.raises(ValueError, match="`reference`"):
        log.load_state_dict({**kept, "reference": {"0.weight": torch.zeros(48, 32)}})
    assert same(log.state_dict()["reference"], kept["reference"])
    del model
