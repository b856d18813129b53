"""The small networks: their layers, their determinism, their curvature."""

import pytest
import torch

from stepwell.train.models import cifar_cnn, digits_cnn, mlp


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


@pytest.mark.parametrize(("make", "sizes"), [(mlp, (8, 6, 2)), (digits_cnn, (2, 3)), (cifar_cnn, (2, 3))])
def test_seed_alone_sets_the_weights_and_global_randomness_is_left_alone(make, sizes):
    before = torch.get_rng_state()
    one, two, other = (make(sizes, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_digits_cnn_computes_its_layers_by_hand():
    model, x = digits_cnn((2, 3), seed=0), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    by_hand = x.view(4, 1, 8, 8)
    for conv in (model.conv1, model.conv2):
        padded = torch.nn.functional.pad(by_hand, (1, 1, 1, 1))
        side = by_hand.shape[2]
        windows = torch.stack([padded[:, :, i : i + side, j : j + side] for i in range(3) for j in range(3)], dim=2)
        by_hand = torch.einsum("bckhw,ock->bohw", windows, conv.weight.flatten(2)) + conv.bias[:, None, None]
        by_hand = torch.where(by_hand > 0, by_hand, 0.1 * by_hand)
        by_hand = by_hand.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    torch.testing.assert_close(model(x), by_hand.flatten(1) @ model.fc.weight.T + model.fc.bias)


def test_cifar_cnn_normalises_every_convolution_and_ends_in_ten_logits():
    model = cifar_cnn((4, 6, 8), seed=0)
    norms = [module for module in model if isinstance(module, torch.nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == [4, 6, 8]
    assert [name for name, _ in model.named_parameters() if name.startswith("conv")] == ["conv1.weight", "conv2.weight", "conv3.weight"]
    assert model.fc.in_features == 8 * 4
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    twice = model(2 * x)
    torch.testing.assert_close(twice, model(x), atol=1e-3, rtol=1e-3)  # batch statistics take the scale away, up to their epsilon
    assert twice.shape == (5, 10)


@pytest.mark.parametrize(("make", "most"), [(digits_cnn, 3), (cifar_cnn, 4)])
def test_too_many_convolutions_are_refused(make, most):
    assert make((2,) * most, seed=0) is not None
    with pytest.raises(ValueError, match=r"`channels` must name one to .* got \(2, 2"):
        make((2,) * (most + 1), seed=0)


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
