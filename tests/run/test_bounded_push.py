"""The penalty never throws a weight away, even one that the task has no curvature for."""

import pytest
import torch
from tests.cases import gaussian

import stepwell as sw
from stepwell.run import passes

LR, STEPS = 1e-2, 60


def largest_travel(optimizer_kind):
    """Train a layer whose first input is always zero and whose first weights are their blocks' largest; return how far those move."""
    layer = torch.nn.Linear(32, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(0.1 * gaussian(8, 32, seed=0))
        layer.weight[:, 0] = 1.0
    optimizer = optimizer_kind(layer.parameters(), lr=LR)
    sw.attach(layer, sw.lotion(sw.int2(block=32), loss_terms=64), optimizer)
    travel, before = 0.0, layer.weight[:, 0].clone()
    for step in range(STEPS):
        inputs = gaussian(64, 32, seed=step)
        inputs[:, 0] = 0
        optimizer.zero_grad()
        (layer(inputs) - inputs[:, 1:9]).square().mean().backward()
        optimizer.step()
        after = layer.weight[:, 0].detach()
        travel = max(travel, (after - before).abs().max().item())
        before = after.clone()
    return travel


@pytest.mark.parametrize("optimizer_kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam], ids=lambda kind: kind.__name__)
def test_a_dead_weight_that_sets_the_scale_moves_at_a_bounded_rate(optimizer_kind, monkeypatch):
    """Its second moment is zero, so a bounded push of 10 epsilon moves it by at most 10 learning rates (Adam divides by epsilon).

    RAdam before its variance is tractable does not divide, and moves less; weight decay adds lr * 0.01 of the weight.
    """
    assert LR * 0.1 < largest_travel(optimizer_kind) <= 10.1 * LR
    monkeypatch.setattr(passes, "REACH", 1e15)
    assert not largest_travel(optimizer_kind) <= 1e3 * LR  # also where it is NaN: this is what the bound is for
