"""Rounded activations: the arithmetic against its formula, what is hooked and what is refused, training, compiling and resuming."""

import copy

import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.activation_grids import Range, per_tensor, per_token
from stepwell.activations import without_rounding


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def codes(x: float, grid: Range) -> float:
    """The operator's formula, one number at a time, in exact arithmetic after the float32 division."""
    quotient = float(torch.tensor(x) / torch.tensor(grid.scale))
    return (min(127, max(-128, round(quotient) + grid.zero)) - grid.zero) * grid.scale


@pytest.mark.parametrize("grid", [Range(0.05, 3), Range(0.125, -128), Range(1.0, 0)])
def test_static_rounding_is_the_operators_formula(grid):
    x = torch.cat([torch.randn(300, generator=torch.Generator().manual_seed(0)) * 8, torch.arange(-9, 9) * grid.scale / 2])
    expected = torch.tensor([codes(float(value), grid) for value in x])
    assert torch.allclose(per_tensor(x, grid), expected, rtol=2**-23, atol=0)  # the product with the scale is rounded once


def test_a_range_holds_zero_and_both_ends():
    for low, high in ((-1.5, 6.25), (0.5, 6.0), (-3.0, -1.0), (0.0, 0.0), (-1e-3, 500.0)):
        grid = Range.of(low, high)
        ends = per_tensor(torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)]), grid)
        assert ends[1] == 0
        assert (ends - torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])).abs().max() <= 0.5000001 * grid.scale


def test_dynamic_rounding_is_symmetric_per_token_and_at_most_half_a_step_off():
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    x[2, 3] = 0
    rounded = per_token(x, (-1,))
    step = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((rounded - x).abs() <= 0.50001 * step).all())
    assert torch.equal(per_token(-x, (-1,)), -rounded)
    assert rounded[2, 3].abs().max() == 0
    units = rounded / torch.where(step > 0, step, 1)
    assert (units - units.round()).abs().max() < 1e-4
    assert torch.equal(rounded[1], per_token(x[1], (-1,)))  # one token does not see another
    assert per_token(x.bfloat16(), (-1,)).dtype == torch.bfloat16


def test_gradients_go_straight_through_and_stop_where_a_range_clips():
    x = torch.tensor([-9.0, -0.3, 0.2, 9.0], requires_grad=True)
    (per_tensor(x, Range(0.01, 0)) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]
    x.grad = None
    (per_token(x, (-1,)) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def by_hand(model: nn.Sequential, x: torch.Tensor, grids: list[Range] | None) -> torch.Tensor:
    """Compute the mlp with rounded inputs, without hooks."""
    for place, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            x = per_token(x, (-1,)) if grids is None else per_tensor(x, grids[place // 2])
            x = nn.functional.linear(x, layer.weight, layer.bias)
        else:
            x = layer(x)
    return x


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_selected_layers_see_rounded_inputs_until_the_handle_is_removed(kind):
    model, x = mlp(), torch.randn(8, 16)
    plain, keys = model(x), list(model.state_dict())
    model.train()
    handle = sw.quantize_activations(model, calibrate=[x, (2 * x,), {"input": -x}] if kind == "static" else None)
    assert all(module.training for module in model.modules())
    assert handle.modules == ("0", "2")
    assert list(model.state_dict()) == keys
    grids = None if kind == "dynamic" else [handle.static["0"], handle.static["2"]]
    if grids is not None:
        assert grids[0] == Range.of(float(min((2 * x).min(), (-x).min())), float(max((2 * x).max(), (-x).max())))
        assert grids[1].zero == -128  # what comes out of a ReLU
    assert torch.equal(model(x), by_hand(model, x, grids))
    assert not torch.equal(model(x), plain)
    with without_rounding(model):
        assert torch.equal(model(x), plain)
    assert kind in repr(handle)
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), plain)
    assert "removed" in repr(handle)


def test_static_ranges_resume_without_data():
    model, x = mlp(), torch.randn(8, 16)
    first = sw.quantize_activations(model, calibrate=[x])
    twin = copy.deepcopy(mlp())
    second = sw.quantize_activations(twin, static=first.static)
    assert torch.equal(model(x), twin(x))
    assert second.static == first.static


def test_convolutions_take_an_image_for_a_token_and_skipped_layers_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    handle = sw.quantize_activations(model, skip=["2"])
    x = torch.randn(2, 3, 6, 6) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)
    step = x.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = model[2](model[1](nn.functional.conv2d((x / step).round() * step, model[0].weight, model[0].bias)))
    assert torch.allclose(model(x), expected, rtol=1e-6)
    assert handle.modules == ("0",)


def test_attention_inputs_are_rounded_once_each_and_stay_one_tensor():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    handle = sw.quantize_activations(attention, skip=["out_proj"])
    x = torch.randn(2, 5, 16)
    expected = copy.deepcopy(attention)
    assert handle.modules == ("",)
    handle.remove()
    y = per_token(x, (-1,))
    assert torch.equal(expected(x, x, value=x)[0], attention(y, y, y)[0])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 8, 12)), nn.Parameter(torch.randn(2, 6, 8))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.MultiheadAttention(16, 2), {}, r"'out_proj.weight' belongs to nn.MultiheadAttention.*skip=\['out_proj'\]"),
        (nn.TransformerEncoderLayer(16, 2, 32), {}, r"skip=\['self_attn.out_proj'\]"),
        (Experts(), {}, "'gate_up_proj' is not multiplied with the input of its module"),
        (nn.ReLU(), {}, "must hold a layer"),
        (mlp(), {"calibrate": []}, "'0' was not called by 0 batches"),
        (mlp(), {"calibrate": [torch.full((2, 16), torch.inf)]}, "finite activations.*'0'"),
        (mlp(), {"calibrate": [], "static": {}}, "got both"),
        (mlp(), {"static": {"0": Range(1.0, 0)}}, "2 selected modules: '2' is on one side only"),
    ],
)
def test_what_cannot_be_rounded_is_refused_and_nothing_is_hooked(model, options, words):
    with pytest.raises(ValueError, match=words):
        sw.quantize_activations(model, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rounding_twice_is_refused():
    model = mlp()
    handle = sw.quantize_activations(model)
    with pytest.raises(ValueError, match="already: got 2 hooks"):
        sw.quantize_activations(model)
    handle.remove()
    sw.quantize_activations(model)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_hooks_trace_whole(kind):
    model, x = mlp(), torch.randn(8, 16)
    sw.quantize_activations(model, calibrate=[x] if kind == "static" else None)
    eager = model(x)
    eager.square().sum().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), eager)
    compiled(x).square().sum().backward()
    assert torch.allclose(model[0].weight.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_weights_and_activations_train_together(kind):
    """W4A8: straight-through training on both reaches a lower loss than the same weights rounded afterwards."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    target = torch.tanh(x @ torch.randn(16, 4))
    model = mlp()

    def loss() -> torch.Tensor:
        return (model(x) - target).square().mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    handle = sw.quantize_activations(model, calibrate=[x] if kind == "static" else None)
    q = sw.int4(block=8)
    with torch.no_grad():
        kept = copy.deepcopy(model.state_dict())
        sw.ptq.rtn(model, q)
        rounded = float(loss().detach())
        model.load_state_dict(kept)
    run = sw.attach(model, sw.ste(q), optimizer)
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    run.finalize()
    assert float(loss().detach()) < 0.9 * rounded  # measured: 0.75
    assert len(handle.modules) == 2
