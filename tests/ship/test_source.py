"""Sources: how batches are divided, and what a model is called with."""

from itertools import pairwise

import pytest
import torch
from tests.ship.models import edited, llama
from torch import nn

from stepwell.ship.checkpoint import Checkpoint, open_checkpoint
from stepwell.ship.source import Source, divided, open_source


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


@pytest.mark.parametrize("kind", ["llama in shards", "mixtral"])
def test_a_model_read_tensor_by_tensor_is_the_one_that_transformers_loads(tmp_path, monkeypatch, kind):
    """Every tensor once, by us; expert weights are joined, tied heads and generation settings there as `from_pretrained` has them."""
    import transformers

    if kind == "mixtral":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "num_local_experts": 2}
        config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=1)
        transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    else:
        llama(tmp_path, tied=True, dtype=torch.bfloat16, layers=1, shard="20KB")
    edited(tmp_path / "generation_config.json", temperature=0.25, do_sample=True)
    taken = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (taken.append(name), read(self, name))[1])
    found = open_source(str(tmp_path), None, limit=1, window=None).model
    assert sorted(taken) == sorted(open_checkpoint(tmp_path).tensors)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for one, two in ((found.state_dict(), own.state_dict()), (dict(found.named_buffers()), dict(own.named_buffers()))):
        assert list(one) == list(two)
        assert all(torch.equal(value, two[name]) and value.dtype == two[name].dtype for name, value in one.items())
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == (kind != "mixtral")
    assert found.generation_config.to_dict() == own.generation_config.to_dict()
    assert found.config.to_dict() == own.config.to_dict()
    assert not found.training
