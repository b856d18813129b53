"""GPTQ on models: against the paper's algorithm layer by layer, and everything around it (inputs, order, state, errors)."""

import copy

import numpy as np
import pytest
import torch
from tests.reference.gptq import gptq as slow
from torch import nn

import stepwell as sw
from stepwell.ptq.calibration import columns

Q = sw.int3(block=8)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(24), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    return nn.Sequential(*layers).double()


def data(count: int = 3, seed: int = 1, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return [(torch.randn(40, width, generator=generator) @ mix).double() for _ in range(count)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def by_the_paper(weight: torch.Tensor, inputs: torch.Tensor) -> np.ndarray:
    """The reference on one Linear layer with 3-bit blocks of 8, its grid written out from the definition."""
    w, x = weight.detach().double().numpy(), inputs.detach().double().numpy()
    scale = np.abs(w.reshape(len(w), -1, 8)).max(2).repeat(8, axis=1) / 3
    return slow(w, x.T @ x / len(x), scale[:, :, None] * np.arange(-3, 4))


def test_every_layer_equals_the_paper_on_inputs_from_the_rounded_layers_before_it():
    model, batches = network(), data()
    walked = copy.deepcopy(model).eval()
    encoded = sw.ptq.gptq(model, Q, batches)
    assert list(encoded) == ["0.weight", "4.weight", "6.weight"]
    x = torch.cat(batches)
    for name, layer in walked.named_children():
        if isinstance(layer, nn.Linear):
            layer.weight.data = torch.tensor(by_the_paper(layer.weight, x))
            assert (model[int(name)].weight - layer.weight).abs().max() < 1e-6
        x = layer(x)


def test_the_model_holds_what_was_encoded_and_nothing_else_changes():
    model = network().train()
    before = state(model)
    encoded = sw.ptq.gptq(model, Q, data())
    for name, value in model.state_dict().items():
        assert torch.equal(value, encoded[name].decode() if name in encoded else before[name]), name
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_modules_in_evaluation_mode_stay_there():
    model = network().train()
    model[3].eval()
    sw.ptq.gptq(model, Q, data(1))
    assert [module.training for module in model] == [True, True, True, False, True, True, True]


def test_the_output_is_closer_than_after_rounding_to_nearest():
    model, batches = network(), data(8)
    wanted = model.eval()(torch.cat(batches))
    rtn, gptq = copy.deepcopy(model), copy.deepcopy(model)
    sw.ptq.rtn(rtn, Q)
    sw.ptq.gptq(gptq, Q, batches)
    assert (gptq(torch.cat(batches)) - wanted).square().mean() < 0.7 * (rtn(torch.cat(batches)) - wanted).square().mean()


def test_batches_may_be_an_iterator_and_of_any_form():
    batches = data()
    plain = sw.ptq.gptq(network(), Q, batches)
    forms = {
        "iterator": (iter(batches), None),
        "tuples": ([(x,) for x in batches], None),
        "keywords": ([{"input": x} for x in batches], None),
        "own": ([{"features": x, "label": 0} for x in batches], lambda model, batch: model(batch["features"])),
        "uneven": (torch.cat(batches).split([7, 100, 13]), None),
    }
    for form, (given, forward) in forms.items():
        encoded = sw.ptq.gptq(network(), Q, given, forward=forward)
        assert all(torch.equal(encoded[name].codes, plain[name].codes) for name in plain), form


def test_skip_mapping_and_order_of_columns():
    model = network()
    encoded = sw.ptq.gptq(model, {"0": sw.int8(block=8), "*": Q}, data(), skip=["6"])
    assert {name: weight.quantizer for name, weight in encoded.items()} == {"0.weight": sw.int8(block=8), "4.weight": Q}
    other = sw.ptq.gptq(network(), {"0": sw.int8(block=8), "*": Q}, data(), skip=["6"], order="activation")
    assert not torch.equal(other["0.weight"].codes, encoded["0.weight"].codes)


class Reversed(nn.Module):
    """Layers defined in another order than they are called in, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(16, 4), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


def test_layers_are_rounded_in_the_order_of_the_forward_pass_on_all_their_calls():
    torch.manual_seed(0)
    model, x, seen = Reversed().double(), torch.cat(data()), []
    first, last = model.first.weight.clone(), model.last.weight.clone()
    inputs = torch.cat([x, torch.tanh(model.first(x))])
    encoded = sw.ptq.gptq(model, Q, data(), on_layer=lambda name, _: seen.append(name))
    assert seen == ["first.weight", "last.weight"]
    assert list(encoded) == ["last.weight", "first.weight"]
    assert np.abs(model.first.weight.detach().numpy() - by_the_paper(first, inputs)).max() < 1e-6
    hidden = torch.tanh(model.first(torch.tanh(model.first(x))))  # through the rounded layer
    assert np.abs(model.last.weight.detach().numpy() - by_the_paper(last, hidden)).max() < 1e-6


def test_a_shared_weight_sees_the_inputs_of_all_its_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    model[2].weight = model[0].weight
    before, x = model[0].weight.detach().clone(), torch.cat(data())
    encoded = sw.ptq.gptq(model, Q, data())
    assert list(encoded) == ["0.weight"]
    hidden = torch.tanh(x @ before.T + model[0].bias)
    assert np.abs(encoded["0.weight"].decode().numpy() - by_the_paper(before, torch.cat([x, hidden]))).max() < 1e-6


class Projections(nn.Module):
    """Two layers on one input, a third on the same tensor after it was written to, all behind a layer."""

    def __init__(self):
        super().__init__()
        self.front, self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(4))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = torch.tanh(self.front(x))
        total = self.one(x) + self.two(x)
        return total + self.three(x.mul_(2).add_(torch.arange(16)))


def test_layers_on_one_input_share_a_pass_and_a_written_input_is_another():
    torch.manual_seed(0)
    model = Projections().double()
    apart = {name: sw.ptq.gptq(copy.deepcopy(model), {"front": Q, name: Q}, data())[f"{name}.weight"] for name in ("one", "two", "three")}
    encoded = sw.ptq.gptq(model, Q, data())
    assert all(torch.equal(encoded[f"{name}.weight"].codes, alone.codes) for name, alone in apart.items())
    # three batches: once to see the order, then for front, for one and two together, and for three
    assert model.passes == 3 * (1 + 3)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
    nn.Conv2d(4, 8, 3, groups=4, bias=False),
    nn.Conv1d(4, 6, 3, padding=1, stride=2),
    nn.Conv1d(4, 6, 2, groups=2, padding="same", dilation=2),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_patches_measure_the_change_of_a_convolution(layer):
    """|conv(x; w + d) - conv(x; w)|^2 = sum over rows of d_r^T H d_r, with H summed over patches: torch's convolution is the reference."""
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, 4, *(8, 9)[: layer.weight.ndim - 2], generator=torch.Generator().manual_seed(0)).double()
    change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)).double()
    before = layer(x)
    hessian = sum(part @ part.mT for part in columns(layer, x))
    layer.weight.data += change
    rows = change.reshape(layer.groups, -1, change[0].numel())
    assert ((rows @ hessian) * rows).sum().item() == pytest.approx((layer(x) - before).square().sum().item(), rel=1e-12)
    single = sum(part @ part.mT for part in columns(layer, x[0]))
    assert torch.allclose(single, sum(part @ part.mT for part in columns(layer, x[:1])))


def test_a_network_of_convolutions_is_rounded_better_than_to_nearest():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )
    x = torch.randn(64, 3, 8, 8).cumsum(3)
    grid = sw.int2(block="channel", levels="full")
    wanted, rtn = model(x), copy.deepcopy(model)
    sw.ptq.rtn(rtn, grid)
    encoded = sw.ptq.gptq(model, grid, x.split(16))
    assert [tuple(one.codes.shape) for one in encoded.values()] == [(8, 3, 3, 3), (8, 2, 3, 3), (4, 288)]
    assert (model(x) - wanted).square().mean() < 0.7 * (rtn(x) - wanted).square().mean()


class Conv1D(nn.Module):
    """GPT-2's layer: a Linear whose weight is stored as (in, out); recognised by its name."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def test_weights_stored_inputs_first_are_the_same_layer():
    torch.manual_seed(0)
    turned, plain = Conv1D(16, 8).double(), nn.Linear(16, 8, bias=False).double()
    plain.weight.data = turned.weight.data.T.contiguous()
    one = sw.ptq.gptq(nn.Sequential(turned), Q, data())["0.weight"]
    two = sw.ptq.gptq(nn.Sequential(plain), Q, data())["0.weight"]
    assert torch.equal(one.codes, two.codes.T)
    assert one.quantizer.axis == 0


def test_narrow_parameters_keep_their_dtype():
    model = network().to(torch.bfloat16)
    encoded = sw.ptq.gptq(model, Q, [x.to(torch.bfloat16) for x in data()])
    assert model[0].weight.dtype == torch.bfloat16
    assert encoded["0.weight"].scales.dtype == torch.float32
    assert torch.equal(model[0].weight.detach(), encoded["0.weight"].decode().to(torch.bfloat16))


def test_an_interrupted_call_leaves_the_model_and_can_be_resumed():
    model, saved = network(), {}
    before = state(model)

    def stop_after_two(name, encoded):
        saved[name] = encoded
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sw.ptq.gptq(model, Q, data(), on_layer=stop_after_two)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    seen = []
    resumed = sw.ptq.gptq(model, Q, data(), done=saved, on_layer=lambda name, _: seen.append(name))
    assert seen == ["6.weight"]
    straight = sw.ptq.gptq(network(), Q, data())
    assert all(torch.equal(resumed[name].codes, straight[name].codes) for name in straight)


def test_inputs_that_are_zero_or_few_are_reported():
    model = network()
    with pytest.warns(UserWarning, match="'0.weight' is zero"):
        encoded = sw.ptq.gptq(model, Q, [torch.zeros(4, 16).double()], skip=["4", "6"])
    assert torch.equal(encoded["0.weight"].codes, Q.encode(network()[0].weight).codes)
    with pytest.warns(UserWarning, match="'0.weight' is singular at damping 0"):
        sw.ptq.gptq(network(), Q, [data()[0][:2]], damping=0.0, skip=["4", "6"])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "quantizer", "batches", "options", "error", "words"),
    [
        (Branches, Q, data(), {}, ValueError, "`batches` never reach 'unused.weight': got 3 batches, which call 1 of 2"),
        (network, Q, [], {}, ValueError, "`batches`.*no batch"),
        (network, Q, data()[0], {}, TypeError, "`batches`.*got a Tensor"),
        (network, Q, 3, {}, TypeError, "`batches`.*got a int"),
        (network, Q, [data()[0] * torch.nan], {}, ValueError, "`hessian` of '0.weight' must be finite"),
        (network, Q, data(), {"damping": -1}, ValueError, "`damping`.*-1"),
        (network, Q, data(), {"order": "best"}, ValueError, "`order`.*'best'"),
        (network, sw.int3(block=16), data(), {}, ValueError, "parameter '4.weight'.*block=16"),
        (network, Q, data(), {"skip": ["*"]}, ValueError, "nothing is selected"),
        (network, "int4", data(), {}, TypeError, "`quantizer`.*'int4'"),
        (network, Q, data(), {"done": {"9.weight": Q.encode(torch.ones(8, 8))}}, ValueError, "`done` holds '9.weight'"),
        (network, Q, data(), {"done": {"0.weight": Q.encode(torch.ones(8, 8))}}, ValueError, r"`done` holds '0.weight'.*\(8, 8\)"),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32), Q, data(), {}, ValueError, "'self_attn.in_proj_weight' cannot be calibrated"),
        (lambda: nn.MultiheadAttention(16, 2), Q, data(), {"skip": ["in_proj_weight"]}, ValueError, "'out_proj.weight' cannot be"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(model, quantizer, batches, options, error, words):
    built = model().double()
    before = state(built)
    with pytest.raises(error, match=words):
        sw.ptq.gptq(built, quantizer, batches, **options)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_weights_can_go_elsewhere_one_by_one():
    model, other, found = network(), network(), {}
    expected = sw.ptq.gptq(model, Q, data())
    assert sw.ptq.gptq(other, Q, data(), into=found) == {}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].codes, one.codes) and torch.equal(found[name].scales, one.scales) for name, one in expected.items())
    assert all(torch.equal(value, state(model)[name]) for name, value in other.state_dict().items())
