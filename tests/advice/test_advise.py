"""The advisor on models: what it measures against the same by hand, what it leaves behind, what it costs, and what it refuses."""

import copy
import math
import re
import statistics
from itertools import pairwise

import pytest
import torch
from scipy import stats
from tests.held import Held
from tests.probes.models import Everything
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.advice.advise import advise, judge
from stepwell.advice.forecast import four_terms, packaged
from stepwell.advice.measure import divide
from stepwell.advice.verdict import Advice
from stepwell.probes.stage import Cost

GRIDS = [sw.intn(bits, block="channel", scale="mse") for bits in (8, 3, 2)]


def pixels(count=24, seed=0, size=16):
    """Batches that a small network can learn: which of three directions is largest."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 3, generator=torch.Generator().manual_seed(99))
    found = []
    for _ in range(count):
        x = torch.randn(size, 16, generator=generator)
        found.append((x, (x @ mix).argmax(1)))
    return found


def entropy(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(5)
    widths = (16, 24, 24, 3)
    model = nn.Sequential(*[part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())][:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for batch in pixels(400, seed=7):
        optimizer.zero_grad()
        entropy(model, batch).backward()
        optimizer.step()
    return model.requires_grad_(True)


def train(model, step):
    return entropy(model, pixels(1, seed=1000 + step, size=64)[0])


def losses(model, batches):
    with torch.no_grad():
        return [entropy(model, batch).item() for batch in batches]


def by_hand(model, rounding, measuring):
    """Mean paired difference and its interval by another route: scipy's, at 90 %."""
    rounded = copy.deepcopy(model)
    rounding(rounded)
    changes = [after - before for after, before in zip(losses(rounded, measuring), losses(model, measuring), strict=True)]
    interval = stats.t.interval(0.9, len(changes) - 1, statistics.fmean(changes), stats.sem(changes))
    return statistics.fmean(changes), interval


def test_rounding_and_gptq_are_measured_on_batches_that_did_not_calibrate(net):
    batches = pixels()
    advice = advise(net, entropy, iter(batches), quantizers=GRIDS, tolerance=1e-9)
    calibrating, measuring = batches[::3], [batch for index, batch in enumerate(batches) if index % 3]
    for verdict, q in zip(advice, GRIDS, strict=True):
        rtn, gptq, training = verdict.estimates
        ways = {
            rtn: lambda model, q=q: sw.ptq.rtn(model, q),
            gptq: lambda model, q=q: sw.ptq.gptq(model, q, [x for x, _ in calibrating]),
        }
        for estimate, way in ways.items():
            mean, interval = by_hand(net, way, measuring)
            assert estimate.increase == pytest.approx(mean, abs=1e-6)
            assert (estimate.low, estimate.high) == pytest.approx(interval, rel=1e-4, abs=1e-6)
            assert estimate.measured
        assert not training.measured
        assert training.low <= training.increase <= training.high
    assert "calibrated on 8 batches (every third)" in advice.notes[0]


def test_other_batches_may_calibrate(net):
    batches, other = pixels(), pixels(6, seed=3)
    verdict = advise(net, entropy, batches, quantizers=GRIDS[2:], tolerance=1e-9, calibration=other)[0]
    mean, _ = by_hand(net, lambda model: sw.ptq.gptq(model, GRIDS[2], [x for x, _ in other]), batches)
    assert verdict.estimates[1].increase == pytest.approx(mean, abs=1e-6)


def test_rho_is_that_of_the_probe_from_the_same_directions(net):
    batches = pixels()
    whole = sw.probes.over(entropy, [batch for index, batch in enumerate(batches) if index % 3])
    advice = advise(net, entropy, batches, quantizers=GRIDS, measure=False, seed=4)
    for verdict, q in zip(advice, GRIDS, strict=True):
        assert verdict.rho == pytest.approx(sw.probes.rho_fn(net, whole, toward=q, seed=4).value, rel=1e-6)
        assert verdict.cost == Cost(0)
    # the basin is no quadratic bowl: its width is measured at the tolerance, not scaled to it. A search that begins near the crossing ends
    # in another interval, whose half is 1 / 2^10 of the value at most from the true crossing, as is the probe's own
    for tolerance in (0.4, 1e-3):
        other = advise(net, entropy, batches, quantizers=GRIDS, measure=False, seed=4, tolerance=tolerance)
        there = [sw.probes.rho_fn(net, whole, toward=q, seed=4, tolerance=tolerance).value for q in GRIDS]
        assert [verdict.rho for verdict in other] == pytest.approx(there, rel=2e-3)
    measured = advise(net, entropy, batches, quantizers=GRIDS, seed=4)
    mean = [sw.probes.rho_fn(net, whole, toward=q, seed=4, draws=3).value for q in GRIDS]
    assert [verdict.rho for verdict in measured] == pytest.approx(mean, rel=2e-3)
    assert measured.shared.forward <= 2 + 1 + 31 + 2 * 22  # the first search is from close to zero, the others from a quarter of its end


@pytest.mark.parametrize("unit", [1e-6, 1e4])
def test_a_loss_in_another_unit_gets_verdicts_from_measurements_alone(net, unit):
    """The same model, data and grids: what is measured is the same in the new unit, what is forecast in nats is not used."""
    nats = advise(net, entropy, pixels(), quantizers=GRIDS, tolerance=0.1)
    other = advise(net, lambda model, batch: unit * entropy(model, batch), pixels(), quantizers=GRIDS, tolerance=0.1 * unit)
    for one, two in zip(nats, other, strict=True):
        assert two.rho == pytest.approx(one.rho, rel=1e-4)
        assert two.estimates[0].increase == pytest.approx(unit * one.estimates[0].increase, rel=1e-2, abs=1e-6 * unit)
        assert two.method == (one.method if one.method in ("RTN", "GPTQ") else "uncertain")
        assert two.safe == (one.safe if one.safe in ("RTN", "GPTQ") else None)
        assert math.isnan(two.hit_rate)
        assert any("what is not measured is unknown" in reason for reason in two.reasons) == (two.safe is None)
    assert {"RTN", "uncertain"} <= {verdict.method for verdict in other}


def test_forecast_is_the_packaged_formula(net):
    batches = pixels()
    verdict = advise(net, entropy, batches, quantizers=GRIDS[2:], rate=2e-3, tolerance=0.01)[0]
    formula, floor = packaged().forecasts["probes"], packaged().floor
    values = {"rtn": verdict.estimates[0].increase, "gptq": verdict.estimates[1].increase, "rate": 2e-3}
    whole = sw.probes.over(entropy, [batch for index, batch in enumerate(batches) if index % 3])
    values["rho_fn"] = sw.probes.rho_fn(net, whole, toward=GRIDS[2], tolerance=packaged().tolerance, draws=3).value
    log = formula.intercept + sum(c * math.log(max(values[name], 0 if name == "rate" else floor)) for name, c in formula.powers.items())
    assert verdict.estimates[2].increase == pytest.approx(max(math.exp(log), floor), rel=5e-3)  # of rho_fn's search
    assert verdict.estimates[2].high == pytest.approx(verdict.estimates[2].increase * formula.factor)


def test_what_is_known_is_not_measured_again_and_counts_as_the_grids_cost(net):
    batches, calls = pixels(9), []
    advice = advise(net, entropy, batches, quantizers=GRIDS, tolerance=1e-9)
    known = [{one.method: (one, 1 + 4 * (one.method == "GPTQ")) for one in verdict.estimates[:2]} for verdict in advice]

    def counted(model, batch):
        calls.append(any(batch is one for one in batches[::3]))
        return entropy(model, batch)

    again = judge(net, counted, divide(batches, None), quantizers=GRIDS, known=known, tolerance=1e-9)
    assert list(again) == list(advice)
    assert (again.shared, again.notes) == (advice.shared, advice.notes)
    assert sum(calls) == len(batches[::3])  # whether they reach every layer: GPTQ would look at them layer by layer
    assert len(calls) - sum(calls) == (advice.shared.forward) * len(batches[1::3] + batches[2::3])


def test_no_more_is_measured_than_is_needed(net):
    done = []
    advice = advise(net, entropy, pixels(), quantizers=GRIDS, tolerance=50.0, early=(train, 50), on_step=done.append)
    assert [verdict.method for verdict in advice] == ["RTN"] * 3
    assert [verdict.cost for verdict in advice] == [Cost(1)] * 3
    assert not [words for words in done if "GPTQ" in words or "training" in words]
    assert all(len(verdict.estimates) == 1 for verdict in advice)


def test_early_run_is_straight_through_training_on_a_frozen_grid(net):
    batches, q, steps, rate = pixels(), GRIDS[2], 210, 2e-3
    verdict = advise(net, entropy, batches, quantizers=[q], tolerance=0.01, early=(train, steps), rate=rate)[0]
    encoded, at = sw.probes.rounded(net, q), {}
    latent = {name: net.get_parameter(name).detach().clone().requires_grad_() for name in encoded}
    optimizer, rounded = torch.optim.Adam(latent.values(), lr=rate), copy.deepcopy(net)
    measuring = [batch for index, batch in enumerate(batches) if index % 3]
    for step in range(22):
        for name, weight in latent.items():
            rounded.get_parameter(name).data.copy_(q(weight.detach(), scale=encoded[name].scales))
        pairs = zip(losses(rounded, measuring), losses(net, measuring), strict=True)
        at[step] = statistics.fmean(after - before for after, before in pairs)
        rounded.zero_grad()
        train(rounded, step).backward()
        for name, weight in latent.items():
            weight.grad = rounded.get_parameter(name).grad.clone()
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    reasons = " ".join(verdict.reasons)
    assert f"rounded weights stand at {at[21]:+.3g}" in reasons
    whole = sw.probes.over(entropy, measuring)
    rho = sw.probes.rho_fn(net, whole, toward=q, tolerance=packaged().tolerance, draws=3).value
    said = float(re.search(r"20 steps \(.*?\), says ([\d.e+-]+)", reasons)[1])
    assert said == pytest.approx(four_terms(at[20], verdict.estimates[1].increase, rho), rel=1e-2)  # printed with three digits
    assert verdict.cost.backward == 21


def fingerprint(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.data_ptr(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return tensors, flags, [module.training for module in model.modules()], model.norm.momentum


def assert_same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    for (asked, place, grad), (asked_now, place_now, grad_now) in zip(one[1], other[1], strict=True):
        assert (asked, place) == (asked_now, place_now)
        assert (grad is None and grad_now is None) or torch.equal(grad, grad_now)
    assert one[2:] == other[2:]


def images(count=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(12, 1, 3, 3, generator=generator), torch.randint(5, (12,), generator=generator)) for _ in range(count)]


def disturbed():
    """In the middle of training: gradients, mixed modes, a frozen layer, BatchNorm, dropout."""
    model = Everything().train()
    model.frozen.eval()
    entropy(model, images(1)[0]).backward()
    return model


def learn(model, step):
    return entropy(model.train(), images(1)[0])


@pytest.mark.parametrize("options", [{}, {"early": (learn, 40)}, {"measure": False}], ids=["probes", "early", "width"])
def test_model_is_left_exactly_as_found(options):
    model = disturbed()
    before = fingerprint(model)
    advise(model, entropy, images(), quantizers=[sw.int8(block=None), sw.int2(block="channel")], tolerance=1e-6, **options)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("last", [1, 9, 60, 90, 105])
def test_model_is_left_as_found_when_the_loss_breaks_down(last):
    model, calls = disturbed(), 0
    before = fingerprint(model)

    def breaking(model, batch):
        nonlocal calls
        calls += 1
        if calls == last:
            raise RuntimeError("no more data")
        return entropy(model, batch)

    with pytest.raises(RuntimeError, match="no more data"):
        advise(model, breaking, images(), quantizers=[sw.int2(block="channel")], tolerance=1e-6, early=(learn, 60))
    assert_same(before, fingerprint(model))


def test_cost_is_what_was_spent(net):
    calls = {"calibrating": 0, "measuring": 0}
    batches = pixels(9)
    calibrating = {id(batch) for batch in batches[::3]}

    def counted(model, batch):
        calls["calibrating" if id(batch) in calibrating else "measuring"] += 1
        return entropy(model, batch)

    advice = advise(net, counted, batches, quantizers=GRIDS, tolerance=1e-9)
    # over 6 measuring batches and 3 calibrating ones; the check of reach is one pass over both
    assert advice.cost == Cost((calls["measuring"] - 6) // 6 + (calls["calibrating"] - 3) // 3 + 1)
    assert advice.shared.forward + sum(verdict.cost.forward for verdict in advice) == advice.cost.forward
    assert advice.shared.forward <= 34 + 5 * 22  # three directions at two tolerances


@pytest.mark.parametrize(("measure", "copies"), [(False, 1), (True, 2 + 0.25)])
def test_memory_is_one_copy_of_the_weights_beside_what_gptq_needs(measure, copies):
    # GPTQ holds another copy, which it restores after an error, and the codes, a quarter of one; beside these, as in the probes' own test,
    # a dozen tensors of the layer that is being worked on and the activations of a sample. Its Hessian is such a tensor.
    layers, width = 24, 32
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    batches = [torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    grids = [sw.int2(block="channel"), sw.int3(block="channel")]
    with Held() as held:
        advise(model, lambda model, x: (model(x) - x).square().mean(), batches, quantizers=grids, tolerance=1e-9, measure=measure)
    assert held.peak / (4 * layers * width**2) <= copies + 12 / layers


def test_batchnorm_follows_the_rounded_weights_on_the_batches_that_calibrate():
    model, batches, q = Everything().eval(), images(9), sw.int2(block="channel")
    advice = advise(model, entropy, batches, quantizers=[q], tolerance=1e-9)

    def rounding(model):
        sw.ptq.rtn(model, q)
        torch.optim.swa_utils.update_bn([x for x, _ in batches[::3]], _no_dropout(model))
        model.eval()

    mean, _ = by_hand(model, rounding, [batch for index, batch in enumerate(batches) if index % 3])
    assert advice[0].estimates[0].increase == pytest.approx(mean, abs=1e-5)
    assert "BatchNorm" in advice.notes[1]


def _no_dropout(model):
    model.drop.p = 0.0
    return model


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


def test_weights_inside_an_attention_are_rounded_to_nearest_under_gptq():
    torch.manual_seed(0)
    model, q = Attending().eval(), sw.int2(block="channel")
    batches = [(torch.randn(6, 5, 8), torch.randint(3, (6,))) for _ in range(6)]
    verdict = advise(model, entropy, batches, quantizers=[q], tolerance=1e-9)[0]
    inside = ["mix.in_proj_weight", "mix.out_proj.weight"]

    def rounding(model):
        sw.ptq.rtn(model, q, skip=["head"])
        sw.ptq.gptq(model, q, [x for x, _ in batches[::3]], skip=["mix"])

    mean, _ = by_hand(model, rounding, [batch for index, batch in enumerate(batches) if index % 3])
    assert verdict.estimates[1].increase == pytest.approx(mean, abs=1e-6)
    assert any("cannot see" in reason and all(name in reason for name in inside) for reason in verdict.reasons)


def test_one_batch_widens_the_interval_and_says_so(net):
    advice = advise(net, entropy, pixels(1, size=400), quantizers=GRIDS[2:], tolerance=1e-9)
    assert "both calibrates GPTQ and measures" in advice.notes[0]
    rtn = advice[0].estimates[0]
    assert (rtn.low, rtn.high) == pytest.approx((rtn.increase / 2, rtn.increase * 2))
    near = advise(net, entropy, pixels(1, size=400), quantizers=GRIDS[2:], tolerance=1.5 * rtn.increase)[0]
    assert near.method == "uncertain"


def test_a_grid_per_name_and_names_to_skip(net):
    mixed = {"0": sw.int8(block="channel"), "4": None, "*": sw.int2(block="channel")}
    one = advise(net, entropy, pixels(), quantizers=[mixed], tolerance=1e-9)[0]
    mean, _ = by_hand(net, lambda model: sw.ptq.rtn(model, mixed), [batch for index, batch in enumerate(pixels()) if index % 3])
    assert one.estimates[0].increase == pytest.approx(mean, abs=1e-6)
    assert one.grid == f"{mixed['0']} + {mixed['*']}"
    same = advise(net, entropy, pixels(), quantizers=[{"0": mixed["0"], "*": mixed["*"]}], tolerance=1e-9, skip=["4"])[0]
    assert same.estimates == one.estimates


def test_a_loss_that_explodes_on_the_grid_rules_rounding_out():
    model = nn.Linear(16, 4)
    weight = model.weight.detach().clone()

    def loss(model, x):
        away = (model.weight - weight).abs().max()
        return torch.where(away > 1e-3, torch.tensor(math.nan), 1.0 + model(x).mean() * 0)

    verdict = advise(model, loss, [torch.randn(2, 16) for _ in range(4)], quantizers=[sw.int2(block="channel")])[0]
    assert [one.increase for one in verdict.estimates[:2]] == [math.inf] * 2
    assert verdict.method in ("not reachable", "uncertain")
    assert math.isfinite(verdict.estimates[2].increase)


class Idle(nn.Module):
    """Its second layer sees zeros only, so that its Hessian is zero."""

    def __init__(self):
        super().__init__()
        self.live, self.idle = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        return self.live(x) + self.idle(0 * x)


def test_a_layer_without_input_is_reported_and_does_not_stop_it():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"Hessian of 'idle\.weight' is zero"):
        verdict = advise(Idle(), entropy, pixels(), quantizers=GRIDS[2:], tolerance=1e-9)[0]
    assert math.isfinite(verdict.estimates[1].increase)


def test_prints_as_a_table_and_a_line(net):
    advice = advise(net, entropy, pixels(), quantizers=GRIDS, early=(train, 100))
    assert isinstance(advice, Advice)
    assert isinstance(advice, list)
    lines = str(advice).splitlines()
    assert len(lines) == 1 + len(GRIDS) + 3
    assert all(len(line) <= 120 for line in lines[:4])
    for verdict, line in zip(advice, lines[1:], strict=False):
        assert str(verdict.grid) in line
        assert len(str(verdict)) <= 100
        assert verdict.low <= verdict.predicted <= verdict.high
        assert 0 < verdict.hit_rate <= 1
        assert verdict.reasons


def drop(model, batch):
    return nn.functional.dropout(model(batch[0]), training=True).square().mean()


GOOD = {"quantizers": GRIDS}
REFUSALS = {
    "tolerance": (ValueError, "`tolerance` must be a positive number", entropy, pixels, GOOD | {"tolerance": 0}),
    "rate": (ValueError, "`rate` must be a positive number", entropy, pixels, GOOD | {"rate": -1e-3}),
    "no quantizers": (ValueError, "`quantizers` must hold at least one", entropy, pixels, {"quantizers": []}),
    "one quantizer": (TypeError, "`quantizers` must be a list", entropy, pixels, {"quantizers": GRIDS[0]}),
    "no quantizer": (TypeError, "`quantizer` must be a Quantizer", entropy, pixels, {"quantizers": [4]}),
    "no batches": (ValueError, "`batches` must hold data", entropy, list, GOOD),
    "one batch bare": (TypeError, r"Write \[batch\]", entropy, lambda: torch.zeros(3, 16), GOOD),
    "no calibration": (ValueError, "`calibration` must hold data", entropy, pixels, GOOD | {"calibration": []}),
    "no function": (TypeError, "`loss` must be a function", 3.0, pixels, GOOD),
    "no tensor": (TypeError, "must return a tensor", lambda model, batch: 1.0, pixels, GOOD),
    "no scalar": (ValueError, r"must return a scalar: got shape \(16, 3\)", lambda model, batch: model(batch[0]), pixels, GOOD),
    "not finite": (ValueError, "`loss` must be finite", lambda model, batch: model(batch[0]).sum() * math.nan, pixels, GOOD),
    "dropout": (ValueError, "Dropout left on", drop, pixels, GOOD),
    "empty calibration": (ValueError, "one that calibrates", entropy, pixels, GOOD | {"calibration": pixels(2, size=0)}),
    "early": (TypeError, "`early` must be a pair", entropy, pixels, GOOD | {"early": train}),
    "early steps": (ValueError, "got 0 steps", entropy, pixels, GOOD | {"early": (train, 0)}),
    "early unmeasured": (ValueError, "`early` must not be given", entropy, pixels, GOOD | {"early": (train, 9), "measure": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_in_one_line(case, net):
    kind, message, loss, batches, options = case
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(kind, match=message):
        advise(net, loss, batches(), **options)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="nothing is selected"):
        advise(nn.LayerNorm(16), lambda model, batch: model(batch[0]).sum(), pixels(), **GOOD)
    with pytest.raises(TypeError, match="`model` must be a torch module"):
        advise({}, entropy, pixels(), **GOOD)


class Branches(nn.Module):
    """Uses its second layer for large batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        return self.first(x) + (self.second(x) if len(x) > 16 else 0)


@pytest.mark.parametrize("small", ["calibrating", "measuring"])
def test_a_layer_that_no_batch_reaches_is_named(small):
    sizes = {"calibrating": (16, 32), "measuring": (32, 16)}[small]
    options = GOOD | {"calibration": pixels(3, size=sizes[0]), "tolerance": 1e9}  # rounding is enough, and yet it is refused
    with pytest.raises(ValueError, match=r"never reach 'second\.weight'"):
        advise(Branches(), entropy, pixels(3, size=sizes[1]), **options)
    advise(Branches(), entropy, pixels(3, size=sizes[1]), skip=["second"], **options)
