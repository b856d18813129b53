"""The small network: its layers, its determinism, its curvature."""

import pytest
import torch

from stepwell.train.models import mlp


def test_mlp_computes_its_layers_by_hand():
    model = mlp((3, 5, 4, 2), seed=0)
    names = [name for name, _ in model.named_parameters()]
    assert names == [f"fc{k}.{kind}" for k in (1, 2, 3) for kind in ("weight", "bias")]
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    by_hand = x
    for k in (1, 2, 3):
        weight, bias = (model.get_parameter(f"fc{k}.{kind}") for kind in ("weight", "bias"))
        by_hand = by_hand @ weight.T + bias
        by_hand = by_hand if k == 3 else torch.where(by_hand > 0, by_hand, 0.1 * by_hand)
    torch.testing.assert_close(model(x), by_hand)


def test_seed_alone_sets_the_weights_and_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = mlp((8, 6, 2), seed=3), mlp((8, 6, 2), seed=3), mlp((8, 6, 2), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.fc1.weight, other.fc1.weight)


def test_a_unit_that_never_fires_still_has_a_gradient():
    """With ReLU its weights would have none, hence no curvature, and an adaptive optimizer would divide by zero."""
    model = mlp((4, 3, 2), seed=0)
    with torch.no_grad():
        model.fc1.bias.fill_(-100.0)
    model(torch.ones(5, 4)).square().sum().backward()
    assert (model.fc1.weight.grad.abs() > 0).all()


def test_too_few_widths_are_refused():
    with pytest.raises(ValueError, match=r"`widths` must hold inputs and outputs: got \(64,\)"):
        mlp((64,), seed=0)
