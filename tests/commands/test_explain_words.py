"""What `stepwell explain` says: true for one batch, for a loss in any unit, and where searched scales do what no verdict judges."""

import dataclasses
import html

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.advice.forecast import Estimate
from stepwell.commands.explain_page import page
from stepwell.commands.explain_tables import summaries
from stepwell.commands.explain_words import damage, near, searched, signed, verdict, worst
from stepwell.explain import QUICK, measure
from stepwell.explain.sources import Subject
from stepwell.report import render

TINY = dataclasses.replace(QUICK, rounds=4, steps=8, plane=3)


def entropy(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def data(count):
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(24, 16, generator=generator) for _ in range(count)]
    return [(x, x[:, :3].argmax(1)) for x in found]


@pytest.fixture(scope="module")
def net():
    """A network with one weight so large that, one scale for all, the others are rounded to zero; its input is always zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        for batch in data(4):
            optimizer.zero_grad()
            entropy(model, (batch[0] * (torch.arange(16) < 15), batch[1])).backward()
            optimizer.step()
    with torch.no_grad():
        model[0].weight[0, 15] = 1000.0
    return model


def dull(model, batch):
    return entropy(model, (batch[0] * (torch.arange(16) < 15), batch[1]))


@pytest.fixture(scope="module")
def explained(net):
    return measure(net, dull, data(6), quantizers=[sw.intn(4, block=None)], effort=TINY)


def written(explanation):
    subject = Subject("net", nn.Identity(), entropy, [], "nats", (("source", "a test"),))
    return render(page(subject, explanation))


def test_searched_scales_that_are_enough_are_said_beside_a_verdict_that_is_not(explained):
    report = explained.grids[0]
    curved = report.rounded[2]
    assert report.verdict.method in ("train", "not reachable", "uncertain")
    assert not report.rtn.within
    assert curved.within
    assert f"weighted by curvature came within tolerance, {curved.increase:+.3g}"[:60] in searched(report)
    assert searched(report) in verdict(report)
    assert "weighted by curvature came within tolerance" in summaries(explained)[0][2]


def test_where_rounding_is_enough_searched_scales_are_not_mentioned(net):
    report = measure(net, dull, data(6), quantizers=[sw.int8(block="channel")], tolerance=2.0, effort=TINY).grids[0]
    assert report.verdict.method == "RTN"
    assert searched(report) == ""


def test_with_one_batch_nothing_is_called_held_out(net):
    one = measure(net, dull, data(1), quantizers=[sw.intn(2, block="channel")], effort=TINY)
    assert not one.held_out
    text = written(one)
    for words in ("held out", "held-out batches", "did not see", "others calibrated"):
        assert words not in text.replace("On held-out data of", "")
    assert "on the one batch that was given" in text
    several = measure(net, dull, data(6), quantizers=[sw.intn(2, block="channel")], effort=TINY)
    assert several.held_out
    assert "held-out batches" in written(several)
    assert near(one.grids[0], one) != near(several.grids[0], several)


@pytest.mark.parametrize("unit", [1e-6, 1e4])
def test_in_another_unit_no_forecast_is_printed_as_if_it_held(net, unit):
    explanation = measure(
        net, lambda m, b: unit * dull(m, b), data(6), quantizers=[sw.intn(4, block=None)], tolerance=0.01 * unit, effort=TINY
    )
    report = explanation.grids[0]
    assert report.verdict.method == "uncertain"
    assert f"no forecast holds at a tolerance of {0.01 * unit:g}" in verdict(report)
    (_, rows, note), *_ = summaries(explanation)
    assert rows[0]["expected"] == "unknown"
    assert max(len(" ".join(map(str, row.values()))) for row in rows) <= 80
    assert "forecast holds" not in note
    assert "\ntrain: " not in note
    assert "not judged" in written(explanation)


@pytest.mark.parametrize(
    ("method", "safe", "words", "number"),
    [
        ("uncertain", "GPTQ", "GPTQ, or less", "+0.020 (0.010 to 0.030)"),
        ("uncertain", None, "uncertain", "+0.095 (0.070 to 0.120)"),
        ("GPTQ", "GPTQ", "GPTQ is enough", "+0.020 (0.010 to 0.030)"),
    ],
)
def test_a_method_that_is_surely_enough_is_named_with_its_number_where_a_cheaper_one_may_be(explained, method, safe, words, number):
    (report,) = explained.grids
    first = Estimate("RTN", 0.095, 0.07, 0.12, True) if method == "uncertain" else Estimate("RTN", 0.3, 0.2, 0.4, True)
    estimates = (first, Estimate("GPTQ", 0.02, 0.01, 0.03, True))
    judged = dataclasses.replace(
        report, verdict=dataclasses.replace(report.verdict, method=method, safe=safe, estimates=estimates, hit_rate=0.9)
    )
    changed = dataclasses.replace(explained, grids=(judged,))
    (_, rows, note), *_ = summaries(changed)
    assert (rows[0]["verdict"], rows[0]["expected"]) == (words, number)
    assert words in written(changed)
    assert f"Expected increase by {'RTN' if safe is None else 'GPTQ'}: {float(number.split()[0]):+g}" in verdict(judged)
    assert ("or less:" in note) == words.endswith("or less")
    assert bool(searched(judged)) == (safe is None)


def test_no_weight_is_blamed_where_none_does_damage(explained):
    (report,) = explained.grids
    assert worst(report).startswith("0.weight does the most damage: rounded alone it raises the loss by +")
    harmless = tuple(dataclasses.replace(one, alone=-0.0, removed=-0.0) for one in report.closer.layers)
    changed = dataclasses.replace(report, closer=dataclasses.replace(report.closer, layers=harmless))
    assert worst(changed) == damage(changed) == "No weight raises the loss when it alone is rounded."
    assert signed(-0.0) == "+0"


def test_a_point_below_the_float_loss_is_said_to_be_the_gain_of_training(explained):
    (report,) = explained.grids
    low = tuple(dataclasses.replace(one, loss=-0.4, held_out=-0.3, within=True) for one in report.closer.searches)
    changed = dataclasses.replace(report, closer=dataclasses.replace(report.closer, searches=low))
    assert "What lies below the float loss is what training on such data gains" in near(changed, explained)
    level = tuple(dataclasses.replace(one, loss=0.0, held_out=0.0, within=True) for one in report.closer.searches)
    changed = dataclasses.replace(report, closer=dataclasses.replace(report.closer, searches=level))
    assert "below" not in near(changed, explained)


def test_batchnorm_is_said_where_statistics_are_kept(explained):
    words = "BatchNorm keeps the float weights' statistics"
    assert words not in html.unescape(written(explained))
    assert html.unescape(written(dataclasses.replace(explained, settled=True))).count(words) == 2
