"""What `stepwell explain` says: true for one batch, for a loss in any unit, and where searched scales do what no verdict judges."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.commands.explain_page import page
from stepwell.commands.explain_tables import summaries
from stepwell.commands.explain_words import near, searched, verdict
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


def written(explanation):
    subject = Subject("net", nn.Identity(), entropy, [], "nats", (("source", "a test"),))
    return render(page(subject, explanation))


def test_searched_scales_that_are_enough_are_said_beside_a_verdict_that_is_not(net):
    explanation = measure(net, dull, data(6), quantizers=[sw.intn(4, block=None)], effort=TINY)
    report = explanation.grids[0]
    curved = report.rounded[2]
    assert report.verdict.method in ("train", "not reachable", "uncertain")
    assert not report.rtn.within
    assert curved.within
    assert f"weighted by curvature came within tolerance, {curved.increase:+.3g}"[:60] in searched(report)
    assert searched(report) in verdict(report)
    assert "weighted by curvature came within tolerance" in summaries(explanation)[0][2]


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
    ("method", "safe", "words"), [("uncertain", "GPTQ", "GPTQ, or less"), ("uncertain", None, "uncertain"), ("RTN", "RTN", "RTN is enough")]
)
def test_a_method_that_is_surely_enough_is_named_where_a_cheaper_one_may_be(net, method, safe, words):
    explanation = measure(net, dull, data(6), quantizers=[sw.intn(8, block="channel")], effort=TINY)
    (report,) = explanation.grids
    judged = dataclasses.replace(report, verdict=dataclasses.replace(report.verdict, method=method, safe=safe))
    changed = dataclasses.replace(explanation, grids=(judged,))
    (_, rows, note), *_ = summaries(changed)
    assert rows[0]["verdict"] == words
    assert words in written(changed)
    assert ("or less:" in note) == words.endswith("or less")
