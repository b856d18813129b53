"""Batches as one loss: the same numbers as the data in one piece, and refusals."""

import pytest
import torch
from tests.probes.models import normal
from torch import nn

import stepwell as sw


def square(model, batch):
    return model(batch).square().mean()


def test_equal_batches_are_the_data_in_one_piece():
    model, x, q = nn.Linear(6, 4).double(), normal(40, 6, seed=0), sw.int2(block="channel")
    whole = sw.probes.segment(model, lambda m: square(m, x), toward=q)
    parts = sw.probes.segment(model, sw.probes.over(square, iter(x.split(10))), toward=q)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-12)
    one, two = (sw.probes.inward(model, loss, at=q) for loss in (sw.probes.over(square, x.split(10)), lambda m: square(m, x)))
    assert one.projection == pytest.approx(two.projection, rel=1e-12)


@pytest.mark.parametrize(("batches", "kind"), [([], ValueError), (torch.zeros(2, 6), TypeError), ({"x": 1}, TypeError), (3, TypeError)])
def test_no_batches_are_refused(batches, kind):
    with pytest.raises(kind, match="`batches` must"):
        sw.probes.over(square, batches)


def test_scalars_are_asked_for_here_too():
    with pytest.raises(ValueError, match="scalar"):
        sw.probes.segment(nn.Linear(6, 4), sw.probes.over(lambda m, x: m(x), [torch.zeros(2, 6)]), toward=sw.int2(block="channel"))
