"""Round to nearest: what is written, what is returned, and that nothing is written when anything is wrong."""

import copy

import pytest
import torch
from torch import nn

import stepwell as sw


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 48))


class Conv1D(nn.Module):
    """GPT-2's layer: a Linear whose weight is stored as (in, out); recognised by its name."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def rounded_by_loop(weight: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Round a matrix block by block in float64, from the definition: the largest magnitude sits on the highest code."""
    top = 2 ** (bits - 1) - 1
    result = torch.empty_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            part = weight[row, start : start + block].double()
            scale = part.abs().max() / top
            result[row, start : start + block] = torch.round(part / scale) * scale
    return result


def test_weights_are_rounded_and_nothing_else_changes():
    model = network()
    before = state(model)
    encoded = sw.ptq.rtn(model, sw.int4(block=16))
    assert list(encoded) == ["1.weight", "4.weight"]
    for name, value in model.state_dict().items():
        if name in encoded:
            # float32 against float64: a product of scale and code has two roundings, 2**-23 relative at most, and a code of at most 7
            assert torch.allclose(value.double(), rounded_by_loop(before[name], 4, 16), rtol=2**-22, atol=0)
        else:
            assert torch.equal(value, before[name]), name


def test_the_model_holds_what_was_encoded_bit_for_bit():
    model = network()
    encoded = sw.ptq.rtn(model, sw.target("onnx:matmulnbits"))
    assert all(torch.equal(model.get_parameter(name).detach(), weight.decode()) for name, weight in encoded.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rounding_again_changes_nothing():
    model = network()
    first = sw.ptq.rtn(model, sw.int3(block=32))
    before = state(model)
    second = sw.ptq.rtn(model, sw.int3(block=32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


def test_first_match_wins_and_none_and_skip_leave_alone():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    grids = {"0.*": sw.int8(), "1.*": None, "*": sw.int2(), "2.*": sw.int4()}
    encoded = sw.ptq.rtn(model, grids, skip=["3"])
    assert {name: weight.quantizer for name, weight in encoded.items()} == {"0.weight": sw.int8(), "2.weight": sw.int2()}


def test_shared_weight_is_rounded_once():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    encoded = sw.ptq.rtn(model, sw.int4())
    assert list(encoded) == ["0.weight"]
    assert model[2].weight is model[0].weight
    assert torch.equal(model[2].weight.detach(), encoded["0.weight"].decode())


def test_layout_sets_the_axis_unless_the_grid_has_one():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(48, 16))
    latent = model[0].weight.detach().clone()
    encoded = sw.ptq.rtn(model, sw.int4(block=48))  # 48 divides the inputs only: along the outputs this would be an error
    assert encoded["0.weight"].quantizer.axis == 0
    assert torch.equal(model[0].weight.detach(), sw.int4(block=48)(latent.T.contiguous()).T)
    own = sw.ptq.rtn(nn.Sequential(Conv1D(48, 16)), sw.intn(4, block=16, axis=1))
    assert own["0.weight"].quantizer.axis == 1


def test_narrow_parameters_keep_their_dtype():
    model = network().to(torch.bfloat16)
    latent = model[1].weight.detach().clone()
    encoded = sw.ptq.rtn(model, sw.int4())
    assert encoded["1.weight"].scales.dtype == torch.float32
    assert torch.equal(encoded["1.weight"].decode(), sw.int4()(latent.float()))
    assert torch.equal(model[1].weight.detach(), encoded["1.weight"].decode().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "quantizer", "skip", "error", "words"),
    [
        (lambda m: m[4].weight.data.fill_(torch.nan), sw.int4(), (), ValueError, "4.weight"),
        (lambda m: m[4].weight.data[0, 0].fill_(torch.inf), sw.int4(), (), ValueError, "4.weight"),
        (lambda m: None, sw.int4(block=64), (), ValueError, "1.weight.*block=64"),
        (lambda m: None, {"4.*": sw.int4(block=24)}, (), ValueError, "4.weight.*block=24"),
        (lambda m: None, sw.int4(), ("1", "4"), ValueError, "nothing is selected"),
        (lambda m: None, sw.int4(), ("head",), ValueError, "'head' matches no parameter"),
        (lambda m: None, 4, (), TypeError, "`quantizer`.*got 4"),
        (lambda m: None, None, (), TypeError, "`quantizer`.*got None"),
        (lambda m: None, {"1.*": sw.int4(), "4.*": "int4"}, (), TypeError, "`quantizer`.*got 'int4'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, quantizer, skip, error, words):
    model = network()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        sw.ptq.rtn(model, quantizer, skip=skip)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())
