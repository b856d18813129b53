"""The measurement behind `stepwell explain`: every number against the same by hand, the model left as found, what cannot work refused."""

import copy
import dataclasses
import json
import math
import statistics
import warnings

import pytest
import torch
from tests.probes.models import Everything, row
from torch import nn
from torch.nn.functional import cross_entropy, dropout

import stepwell as sw
from stepwell.commands.output import plain
from stepwell.explain import NORMAL, QUICK, measure, planned, scheme
from stepwell.explain.rounding import holding
from stepwell.quantizers import Quantizer

BITS = (8, 3, 2)
GRIDS = [sw.intn(bits, block="channel", scale="mse") for bits in BITS]
TINY = dataclasses.replace(QUICK, rounds=3, steps=8, plane=3)


def data(count, seed, size=16):
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


BATCHES = data(6, seed=3)
CALIBRATING, MEASURING = BATCHES[::3], [batch for index, batch in enumerate(BATCHES) if index % 3]


def mean_loss(model, batches):
    with torch.no_grad():
        return statistics.fmean(entropy(model, batch).item() for batch in batches)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for batch in data(300, seed=7):
        optimizer.zero_grad()
        entropy(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def found(net):
    """The explanation, in which part the loss of which kind of batch was evaluated, and what progress was told."""
    calls, told = [], []

    def counted(model, batch):
        calls.append((told[-1][0], any(batch is one for one in CALIBRATING)))
        return entropy(model, batch)

    before = copy.deepcopy(net.state_dict())
    net.train()
    explanation = measure(
        net, counted, BATCHES, quantizers=GRIDS, tolerance=0.05, effort=TINY, progress=lambda part, done: told.append((part, done))
    )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    return explanation, calls, told


def test_float_loss_is_that_of_the_measuring_batches(net, found):
    explanation = found[0]
    each = [mean_loss(net, [batch]) for batch in MEASURING]
    assert explanation.start == pytest.approx(statistics.fmean(each), rel=1e-6)
    assert explanation.start_stderr == pytest.approx(statistics.stdev(each) / math.sqrt(len(each)), rel=1e-4)
    assert explanation.search_start == pytest.approx(mean_loss(net, CALIBRATING), rel=1e-6)
    assert explanation.batches == (len(CALIBRATING), len(MEASURING))
    assert (explanation.layers, explanation.weights) == (3, 16 * 24 + 24 * 24 + 24 * 3)


def by_hand(net, method, quantizer):
    """The same rounding by the public functions, on a copy."""
    model = copy.deepcopy(net)
    if method == "RTN":
        sw.ptq.rtn(model, quantizer)
    elif method == "GPTQ":
        sw.ptq.gptq(model, quantizer, [x for x, _ in CALIBRATING])
    else:
        for layer in model:
            if isinstance(layer, nn.Linear):
                cost = None if method == "MSE scales" else squared_gradient(net, layer.weight.shape)
                scale = sw.ptq.scale_search(layer.weight.detach(), quantizer, cost)
                layer.weight.data = quantizer(layer.weight.detach(), scale=scale)
    return model


def squared_gradient(net, shape):
    total = torch.zeros(shape)
    for batch in CALIBRATING:
        model = copy.deepcopy(net)
        entropy(model, batch).backward()
        total += next(p.grad for p in model.parameters() if p.shape == shape) ** 2
    return total / len(CALIBRATING)


@pytest.mark.parametrize("method", ["RTN", "MSE scales", "curvature scales", "GPTQ"])
def test_each_way_of_rounding_loses_what_it_loses_by_hand(net, found, method):
    for quantizer, report in zip(GRIDS, found[0].grids, strict=True):
        result = next(one for one in report.rounded if one.method == method)
        model = by_hand(net, method, quantizer)
        changes = [mean_loss(model, [batch]) - mean_loss(net, [batch]) for batch in MEASURING]
        # codes agree exactly; sums of a batch in another order move a loss by some ulps of float32
        assert result.increase == pytest.approx(statistics.fmean(changes), abs=2e-6)
        assert result.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(len(changes)), abs=2e-6)
        assert result.within == (result.increase <= 0.05)
        if method in ("RTN", "GPTQ"):  # three layers' inputs and their order of use: four passes that calibrate
            assert result.forward == {"RTN": 1, "GPTQ": 5}[method]


def test_damage_is_that_of_rounding_one_weight_or_all_but_one(net, found):
    report = next(one for one in found[0].grids if one.closer is not None)
    quantizer = GRIDS[BITS.index(report.bits)]
    assert [one.alone for one in report.closer.layers] == sorted((one.alone for one in report.closer.layers), reverse=True)
    for one in report.closer.layers:
        alone, others = copy.deepcopy(net), copy.deepcopy(net)
        sw.ptq.rtn(alone, {one.name: quantizer, "*": None})
        sw.ptq.rtn(others, quantizer, skip=[one.name])
        together = by_hand(net, "RTN", quantizer)
        assert one.alone == pytest.approx(mean_loss(alone, MEASURING) - mean_loss(net, MEASURING), abs=2e-6)
        assert one.removed == pytest.approx(mean_loss(together, MEASURING) - mean_loss(others, MEASURING), abs=2e-6)


def test_lines_and_ratios_are_those_of_the_probes(net, found):
    def loss(model):
        return torch.stack([entropy(model, batch) for batch in MEASURING]).mean()

    for quantizer, report in zip(GRIDS, found[0].grids, strict=True):
        line = sw.probes.segment(net, loss, toward=quantizer, positions=TINY.positions)
        assert report.line.losses == pytest.approx(line.losses, rel=1e-6)
        ratio = sw.probes.rho_fn(net, loss, toward=quantizer, tolerance=0.05, draws=3)
        assert report.rho_fn == pytest.approx(ratio.value, rel=2e-3)  # the advisor begins its searches elsewhere
        assert report.rho_uniform.value == pytest.approx(
            sw.probes.rho_uniform(net, loss, toward=quantizer, tolerance=0.05, draws=1).value, rel=1e-5
        )
        assert report.rho_self.tautology
        if report.line.defect == 0:
            assert (report.rho_self.value > 1) == (not report.rtn.within)


def test_searches_report_both_kinds_of_data(net, found):
    report = next(one for one in found[0].grids if one.closer is not None)
    flip, box = report.closer.searches
    rounded = by_hand(net, "RTN", GRIDS[BITS.index(report.bits)])
    for search in (flip, box):
        assert search.before == pytest.approx(mean_loss(rounded, CALIBRATING) - mean_loss(net, CALIBRATING), abs=2e-6)
        assert search.held_out_before == pytest.approx(report.rtn.increase, abs=2e-6)
        assert search.within == (search.loss <= 0.05 and search.held_out <= 0.05)
        assert search.history[0] == pytest.approx(search.before)
    assert flip.loss <= flip.before
    assert box.evaluations == TINY.steps


def test_the_widest_failing_grid_gets_the_closer_look(found):
    explanation = found[0]
    failing = [report.bits for report in explanation.grids if not report.rtn.within]
    assert failing
    assert [report.bits for report in explanation.grids if report.closer is not None] == [max(failing)]


def test_every_failing_grid_gets_one_if_asked(net):
    explanation = measure(
        net, entropy, BATCHES, quantizers=GRIDS, tolerance=1e-4, effort=dataclasses.replace(TINY, every=True, rounds=1, steps=1)
    )
    failing = [report.bits for report in explanation.grids if not report.rtn.within]
    assert len(failing) >= 2
    assert [report.bits for report in explanation.grids if report.closer is not None] == failing


def test_the_narrowest_grid_gets_one_where_nothing_fails(net):
    explanation = measure(net, entropy, BATCHES, quantizers=GRIDS[::-1], tolerance=50.0, effort=TINY)
    assert all(report.rtn.within for report in explanation.grids)
    assert [report.bits for report in explanation.grids if report.closer is not None] == [min(BITS)]


def test_verdicts_are_those_of_the_advisor_on_the_same_batches(net, found):
    advice = sw.advise(net, entropy, MEASURING, calibration=CALIBRATING, quantizers=GRIDS, tolerance=0.05)
    assert [report.verdict.method for report in found[0].grids] == [one.method for one in advice]
    assert [report.verdict.predicted for report in found[0].grids] == pytest.approx([one.predicted for one in advice], rel=1e-5)
    for report, one in zip(found[0].grids, advice, strict=True):
        assert [known.method for known in report.verdict.estimates] == [known.method for known in one.estimates]
        assert [known.high for known in report.verdict.estimates] == pytest.approx([known.high for known in one.estimates], rel=1e-5)
    assert [report.verdict.cost for report in found[0].grids] == [one.cost for one in advice]
    assert found[0].worth == advice.notes[-1]


def test_what_was_measured_is_not_measured_again_for_the_verdict(found):
    explanation, calls, _ = found
    advice = [calibrating for part, calibrating in calls if part == "advice"]
    assert sum(advice) == len(CALIBRATING)  # whether they reach every layer, once; GPTQ would look at them layer by layer
    widths = 2 * (31 + 2 * 22)  # in three directions, at the tolerance and at that of the fit
    assert len(advice) - sum(advice) <= (3 + widths) * len(MEASURING)
    assert sum(part == "GPTQ" for part, _ in calls) == sum(report.gptq.forward - 1 for report in explanation.grids) * len(CALIBRATING)


def test_parameters_that_stay_in_float_are_listed_with_their_reason(net, found):
    names = [name for name, _ in net.named_parameters() if name.endswith("bias")]
    assert [(one.name, one.elements) for one in found[0].floats] == [(name, net.get_parameter(name).numel()) for name in names]
    assert {one.reason for one in found[0].floats} == {"bias of Linear is no matrix"}
    skipped = measure(net, entropy, BATCHES, quantizers=GRIDS[:1], skip=["2"], effort=TINY).floats
    assert {one.reason for one in skipped if one.name.startswith("2.")} == {"skipped by name"}
    assert sum(one.elements for one in skipped) + 16 * 24 + 24 * 3 == sum(parameter.numel() for parameter in net.parameters())


def test_passes_are_counted_and_told(found):
    explanation, calls, told = found
    assert explanation.forward == pytest.approx(len(calls) / len(BATCHES), rel=1e-12)
    assert [one.part for one in explanation.spent] == list(dict.fromkeys(part for part, _ in told))
    done = [number for _, number in told]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(explanation.forward + 2 * explanation.backward, rel=1e-12)
    plan = planned(TINY, grids=len(GRIDS), schemes=1, layers=3, batches=explanation.batches)
    assert 0.6 < plan / done[-1] < 1.6  # widths take 10 to 31 passes each; 20 is planned


def test_the_records_are_values_that_json_takes(found):
    text = json.dumps(plain(dataclasses.asdict(found[0])), allow_nan=False)
    assert json.loads(text)["grids"][0]["rounded"][0]["method"] == "RTN"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].start = 0.0


def test_a_near_point_is_found_where_rounding_misses_it():
    """Two weights of one row: rounding both down is .78 away, rounding one of them up only .22 (both searches can find that)."""
    layer = row([0.42, 0.36])

    def away(model, batch):
        return (model.weight.sum() - 0.78).abs() + 0 * model(batch).sum()

    batches = [torch.ones(1, 2, dtype=torch.float64)] * 3
    grid = Quantizer(sw.intn(2).format, rule=1.0)
    report = measure(layer, away, batches, quantizers=[grid], tolerance=0.5, effort=TINY).grids[0]
    assert report.rtn.increase == pytest.approx(0.78)
    flip = report.closer.searches[0]
    assert (flip.loss, flip.held_out, flip.within) == (pytest.approx(0.22), pytest.approx(0.22), True)


def test_batchnorm_is_estimated_anew_for_losses_and_frozen_in_lines():
    model, q = Everything(), sw.intn(3, block="channel")
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 1, 3, 3, generator=generator), torch.randint(5, (16,), generator=generator)) for _ in range(6)]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    explanation = measure(model, entropy, batches, quantizers=[q], effort=TINY)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert any("BatchNorm" in note for note in explanation.notes)
    report = explanation.grids[0]
    measuring = [batch for index, batch in enumerate(batches) if index % 3]
    loss = sw.probes.over(entropy, measuring)
    line = sw.probes.segment(model, loss, toward=q, positions=(0.0, 1.0))
    settled = sw.probes.segment(model, loss, toward=q, positions=(0.0, 1.0)).final

    def deployed(grids):
        found = copy.deepcopy(model).eval()
        sw.ptq.rtn(found, grids)
        for module in found.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None
                module.train()
        with torch.no_grad():
            for x, _ in batches[::3]:
                found(x)
            return loss(found.eval()).item()

    assert report.rtn.loss == pytest.approx(deployed(q), rel=1e-5)
    for one in report.closer.layers:
        assert one.alone == pytest.approx(deployed({one.name: q, "*": None}) - explanation.start, abs=1e-5)
        assert one.removed == pytest.approx(report.rtn.loss - deployed({one.name: None, "*": q}), abs=1e-5)
    assert explanation.settled
    assert report.rtn.increase == pytest.approx(report.verdict.estimates[0].increase, rel=1e-5)  # the verdict judges the same number
    assert report.rtn.loss != pytest.approx(settled, rel=1e-5)  # which would have seen the data that measures
    assert report.line.losses[report.line.positions.index(1.0)] == pytest.approx(line.losses[1], rel=1e-6)
    assert line.final != pytest.approx(line.losses[1], rel=1e-3)


def test_batchnorm_that_keeps_no_statistics_has_none_to_estimate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    explanation = measure(model, entropy, BATCHES, quantizers=[GRIDS[2]], effort=TINY)
    assert not explanation.settled
    assert not any("BatchNorm" in note for note in explanation.notes)
    report = explanation.grids[0]
    assert report.line.losses[report.line.positions.index(1.0)] == pytest.approx(report.rtn.loss, rel=1e-6)


class Attending(nn.Module):
    """Attention, whose projections GPTQ cannot calibrate, and a layer that it can."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0])


def test_weights_that_gptq_cannot_calibrate_are_rounded_to_nearest_and_named():
    torch.manual_seed(0)
    explanation = measure(Attending(), entropy, BATCHES, quantizers=[GRIDS[1]], effort=TINY)
    note = next(note for note in explanation.notes if "GPTQ cannot calibrate" in note)
    assert "attention.in_proj_weight" in note
    assert "head.weight" not in note
    assert {one.name for one in explanation.grids[0].closer.layers} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }


def test_one_batch_is_enough_but_gives_no_error(net):
    explanation = measure(net, entropy, BATCHES[:1], quantizers=[GRIDS[2]], effort=TINY)
    assert math.isnan(explanation.start_stderr)
    assert math.isnan(explanation.grids[0].rtn.stderr)
    assert explanation.start == explanation.search_start
    assert "One batch" in explanation.notes[0]


def test_holding_puts_weights_back_after_an_error(net):
    before = copy.deepcopy(net.state_dict())

    def fail():
        with holding(net, {"0.weight": torch.zeros(24, 16)}):
            assert not net[0].weight.any()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_schemes_have_short_names_and_unusual_grids_their_whole_one():
    assert [scheme(sw.intn(bits, block=None, scale="absmax")) for bits in (2, 8)] == ["tensor-absmax"] * 2
    assert scheme(sw.int4(block=64, scale="mse")) == "block64-mse"
    assert scheme(sw.mxfp4()) == str(sw.mxfp4())
    assert scheme(sw.int4(block=32, scale_dtype="fp16")) == str(sw.int4(block=32, scale_dtype="fp16"))


def test_more_effort_is_planned_as_more_passes():
    sizes = {"grids": 4, "schemes": 1, "layers": 24, "batches": (4, 8)}
    assert planned(QUICK, **sizes) < planned(NORMAL, **sizes)


def half_reached(model, batch):
    return model[0](batch[0]).square().mean()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tolerance": 0}, ValueError, "`tolerance` must be a positive number"),
        ({"batches": []}, ValueError, "`batches` must hold data: got no batch"),
        ({"batches": torch.zeros(3)}, TypeError, "`batches` must be an iterable of batches"),
        ({"quantizers": []}, ValueError, "`quantizers` must hold at least one grid"),
        ({"quantizers": [4]}, TypeError, "`quantizers` must be a list of quantizers"),
        ({"quantizers": [sw.int4(block=7)]}, ValueError, "0.weight"),
        ({"skip": ["*"]}, ValueError, "nothing is selected"),
        ({"loss": lambda model, batch: model(batch[0])}, ValueError, "`loss` must return a scalar"),
        ({"loss": lambda model, batch: entropy(model, batch).item()}, TypeError, "`loss` must return a tensor"),
        ({"loss": lambda model, batch: entropy(model, batch) * math.nan}, ValueError, "`loss` must be finite"),
        ({"loss": lambda model, batch: entropy(model, (dropout(batch[0]), batch[1]))}, ValueError, "Dropout left on"),
        ({"loss": lambda model, batch: entropy(model, batch).detach()}, ValueError, "`loss` must be differentiable"),
        ({"batches": [(BATCHES[0][0] * math.nan, BATCHES[0][1]), *BATCHES[1:]]}, ValueError, "`loss` must be finite on every batch"),
        ({"loss": half_reached}, ValueError, "`batches` never reach '2.weight', '4.weight'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_measured(net, change, error, words):
    told = []
    arguments = {"loss": entropy, "batches": BATCHES, "quantizers": GRIDS} | change
    with pytest.raises(error, match=words):
        measure(net, arguments.pop("loss"), arguments.pop("batches"), **arguments, progress=lambda part, done: told.append(part))
    assert set(told) <= {"checks"}


def test_a_hessian_without_any_input_is_reported_in_the_notes(net):
    """Inputs that are all zero: GPTQ rounds that layer to nearest, and says so."""
    blank = [(torch.zeros(8, 16), batch[1][:8]) for batch in BATCHES]
    with pytest.warns(match="another") as caught:  # others' warnings pass
        explanation = measure(net, warning, blank, quantizers=[GRIDS[1]], effort=TINY)
    assert {str(one.message) for one in caught} == {"another warning"}
    assert [note for note in explanation.notes if note.startswith("The Hessian of '0.weight' is zero")]


def warning(model, batch):
    warnings.warn("another warning", stacklevel=1)
    return entropy(model, batch)
