"""Before tracing: an example or an axis that does not fit is one clear error, on an otherwise silent screen."""

import pytest
import torch
from torch import nn

import stepwell as sw

from .conftest import mlp, run


def arguments(**changes):
    torch.manual_seed(0)
    model = mlp()
    return {"model": model, "encoded": sw.ptq.rtn(model, sw.int4()), "example": (torch.randn(4, 64),), **changes}


@pytest.mark.parametrize("inputs", [32, 48, 64, 320, 384])
def test_one_scale_per_tensor_runs_at_every_width(tmp_path, inputs):
    torch.manual_seed(0)
    model, example = nn.Linear(inputs, 64), (torch.randn(4, inputs),)
    encoded = sw.ptq.rtn(model, sw.int4(block=None))
    sw.export.onnx(model, encoded, example, tmp_path / "p.onnx")
    certificate = sw.verify(tmp_path / "p.onnx", model, example, encoded)
    assert certificate.passed
    assert certificate.codes_equal is certificate.scales_equal is True
    weight, bias, x = encoded["weight"].decode().double(), model.bias.detach().double(), example[0].double()
    # one float32 sum of K products and a bias errs by at most (K + 1) u times their sum of magnitudes, u = 2**-24; scales add two
    bound = (inputs + 3) * 2**-24 * (x.abs() @ weight.abs().T + bias.abs())
    assert bool(((torch.from_numpy(run(tmp_path / "p.onnx", *example)).double() - (x @ weight.T + bias)).abs() <= bound).all())


@pytest.mark.parametrize(
    ("sequence", "shape", "error", "said"),
    [
        (5, (4, 64), ValueError, r"`sequence` must be an axis from 1 to 1 for inputs of shape \(4, 64\): got 5"),
        (2, (4, 64), ValueError, "`sequence`.*got 2"),
        (0, (4, 64), ValueError, "`sequence`.*got 0.*Axis 0 is the batch"),
        (-1, (4, 3, 64), ValueError, "`sequence` must be an axis from 1 to 2.*got -1"),
        (1, (4,), ValueError, r"`sequence` must be None.*\(4,\): got 1"),
        (True, (4, 3, 64), TypeError, "`sequence`.*got True"),
        ("time", (4, 3, 64), TypeError, "`sequence`.*got 'time'"),
    ],
)
def test_an_axis_that_the_inputs_do_not_have_is_refused(tmp_path, sequence, shape, error, said):
    with pytest.raises(error, match=said):
        sw.export.onnx(**arguments(example=(torch.randn(shape),)), path=tmp_path / "m.onnx", sequence=sequence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ((torch.ones(4, 63),), "inputs of shape 4x63.*mat1 and mat2"),
        ((torch.ones(1, 65),), "inputs of shape 1x65.*mat1 and mat2"),
        ((torch.ones(4, 64), torch.ones(4)), "inputs of shape 4x64 and 4.*positional argument"),
        ((torch.ones(4, 64, dtype=torch.long),), "inputs of shape 4x64.*dtype"),
    ],
)
def test_an_example_that_the_model_does_not_take_is_one_error(tmp_path, capfd, example, said):
    with pytest.raises(ValueError, match=f"`example`: the model does not run on {said}"):
        sw.export.onnx(**arguments(example=example), path=tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoded": sw.int4().encode(torch.ones(96, 64))}, "`encoded` must map parameter names to Encoded weights: got Encoded"),
        ({"encoded": None}, "`encoded` must map.*got NoneType"),
        ({"model": torch.ones(2, 2)}, "`model` must be a torch module: got Tensor"),
    ],
)
def test_a_weight_instead_of_a_mapping_and_a_tensor_instead_of_a_model_are_refused(tmp_path, changes, said):
    given = arguments(**changes)
    with pytest.raises(TypeError, match=said):
        sw.export.onnx(**given, path=tmp_path / "m.onnx")
    if given["encoded"] is not None:
        sw.export.onnx(**arguments(), path=tmp_path / "m.onnx")
        with pytest.raises(TypeError, match=said):
            sw.verify(tmp_path / "m.onnx", **given)


def test_a_folder_as_path_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="`path` must be a file: got the folder"):
        sw.export.onnx(**arguments(), path=tmp_path)
    assert not list(tmp_path.iterdir())
