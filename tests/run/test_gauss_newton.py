"""The sampled-label Gauss-Newton diagonal against the exact one, and what LOTION makes of it."""

import math

import pytest
import torch
from tests.cases import gaussian
from torch import nn

import stepwell as sw

DRAWS = 300


def read(model, batch):
    return model(batch[0] if isinstance(batch, tuple) else batch)


def exact(model, inputs):
    """Return the diagonal for the logits W x + b: mean over inputs of p (1 - p) x^2, and of p (1 - p)."""
    odds = model(inputs).softmax(-1).detach()
    spread = odds * (1 - odds)
    return {"weight": spread.T @ inputs.square() / len(inputs), "bias": spread.mean(0)}


def test_estimate_is_the_exact_diagonal():
    """Each draw is about a squared normal number times its mean: spread sqrt(2 / draws) per element, five sigma for the largest of 70."""
    torch.manual_seed(0)
    model = nn.Linear(9, 7)
    batches = [gaussian(64, 9, seed=k) for k in range(2)]
    found = sw.gauss_newton(model, read, batches, draws=DRAWS)
    expected = exact(model, torch.cat(batches))
    for name, value in expected.items():
        ratio = found[name] / value
        assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / (2 * DRAWS))
        assert abs(ratio.mean() - 1) < 5 * math.sqrt(2 / (2 * DRAWS) / 7)  # the classes are nearly independent, inputs less so


def test_language_models_average_over_all_positions():
    torch.manual_seed(0)
    model = nn.Linear(9, 7)
    inputs = gaussian(60, 9, seed=1)
    one = sw.gauss_newton(model, read, [inputs.view(4, 15, 9)], draws=5, seed=3)
    two = sw.gauss_newton(model, read, [(inputs, None)], draws=5, seed=3)
    assert all(torch.allclose(one[name], two[name], rtol=1e-4) for name in one)


def test_lotion_takes_it_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curvature = sw.gauss_newton(model, read, [gaussian(32, 16, seed=0)])
    assert list(curvature) == [name for name, _ in model.named_parameters()]
    assert all(value.shape == parameter.shape for value, parameter in zip(curvature.values(), model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    sw.attach(model, sw.lotion(sw.int3(block=8), curvature=curvature), torch.optim.SGD(model.parameters(), lr=0.1))


def test_bad_input_is_named():
    model = nn.Linear(4, 3)
    for draws in (0, 1.5, True):
        with pytest.raises(ValueError, match="`draws`"):
            sw.gauss_newton(model, read, [gaussian(2, 4, seed=0)], draws=draws)
    with pytest.raises(ValueError, match="`batches` must hold data"):
        sw.gauss_newton(model, read, [])
    with pytest.raises(TypeError, match="`batches` must be an iterable"):
        sw.gauss_newton(model, read, gaussian(2, 4, seed=0))
