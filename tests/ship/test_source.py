"""Sources: how batches are divided, and what a model is called with."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from stepwell.ship.source import Source, divided


@pytest.mark.parametrize("count", range(1, 40))
def test_batches_are_divided_without_loss_and_mostly_without_overlap(count):
    learning, measuring = divided(list(range(count)))
    if count == 1:
        assert learning == measuring == [0]
        return
    assert sorted(learning + measuring) == list(range(count))
    assert len(measuring) == min(8, max(1, count // 3))
    gaps = [two - one for one, two in pairwise(measuring)]
    assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, mask=None, *, scale=None):
        y = self.layer(x) if mask is None else self.layer(x) * mask
        return y if scale is None else y * scale


def source(loss):
    batch = torch.ones(3, 4)
    return Source("m:f", Named(), loss, [batch], [batch], "own units", (), None)


def test_inputs_come_in_the_order_of_the_model_s_signature():
    named = source(lambda model, batch: model(mask=batch + 1, x=batch).sum())
    assert [float(part[0, 0]) for part in named.example] == [1.0, 2.0]
    assert [part.shape for part in source(lambda model, batch: model(batch).sum()).example] == [(3, 4)]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, batch: model.layer(batch).sum(), "never calls the model itself"),
        (lambda model, batch: model(batch, scale=2.0).sum(), "with tensors alone, by position: got Tensor, float"),
    ],
)
def test_a_loss_that_does_not_tell_the_inputs_is_refused(loss, words):
    with pytest.raises(ValueError, match=words):
        _ = source(loss).example


def test_loss_terms_are_rows_or_predicted_tokens():
    assert source(lambda model, batch: model(batch).sum()).terms == 3
