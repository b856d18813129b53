"""The user's model for a moment as the runtime sees it, and afterwards exactly as it was."""

import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.export.deployed import deployed


class Counting(nn.Module):
    """Counts its calls in a buffer that two modules share, and keeps a cache that appears in the forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.layer.weight
        self.register_buffer("calls", torch.zeros(()))
        self.layer.register_buffer("calls", self.calls)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        self.calls += 1
        self.register_buffer("cache", x)
        return self.again(self.layer(self.norm(x)))


def test_the_grid_is_seen_inside_and_nothing_remains_outside():
    model = Counting().bfloat16().train()
    model.layer.calls = model.calls  # the cast gave each its own
    model.norm.eval()
    weight = sw.int4().encode(model.layer.weight)
    tensors = {name: (value, value.clone()) for name, value in [*model.named_parameters(), *model.named_buffers(remove_duplicate=False)]}
    with deployed(model, {"again.weight": weight}) as inside:
        assert inside is model
        assert model.layer.weight is model.again.weight
        assert torch.equal(model.layer.weight, weight.decode())
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
        assert not any(module.training for module in model.modules())
        model(torch.ones(2, 32))
        assert model.layer.calls == 1
    assert [module.training for module in model.modules()] == [True, True, True, False]
    after = dict([*model.named_parameters(), *model.named_buffers(remove_duplicate=False)])
    assert list(after) == list(tensors)
    assert all(after[name] is value and torch.equal(value, copy) for name, (value, copy) in tensors.items())


def test_an_exception_inside_brings_everything_back():
    model = Counting().train()
    weight = sw.int4().encode(model.layer.weight)
    before = model.layer.weight
    with pytest.raises(KeyError), deployed(model, {"layer.weight": weight}):
        raise KeyError
    assert model.layer.weight is before
    assert model.training


def test_float32_parameters_that_are_not_encoded_are_not_copied():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    kept = model[1].weight
    with deployed(model, {"0.weight": sw.int4().encode(model[0].weight)}):
        assert model[1].weight is kept
