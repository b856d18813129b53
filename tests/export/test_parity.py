"""The certificate: true files pass, every tampering is found, and the numbers are those of a plain comparison."""

import copy
import json
import shutil
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.export.noise import SinglyRounded

from .conftest import RECIPES, expected, run


@pytest.mark.parametrize("name", RECIPES)
def test_true_file_passes(case, name):
    model, encoded, example, path, exported = case(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    certificate = sw.verify(path, model, example, encoded)
    assert certificate.passed
    assert certificate.codes_equal is certificate.scales_equal is certificate.values_equal is True
    assert certificate.max_relative_error <= certificate.tolerance < 1e-5
    assert certificate.top1_agreement == 1
    assert 0 < certificate.noise < 1e-6
    assert {layer.name for layer in certificate.layers} == set(encoded)
    assert all(layer.nodes for layer in certificate.layers if layer.name in exported.products)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_numbers_are_those_of_a_plain_comparison(case):
    model, encoded, _, path, _ = case("mlp")
    example = (torch.randn(6, 64, generator=torch.Generator().manual_seed(5)),)
    certificate = sw.verify(path, model, example, encoded)
    assert certificate.inputs == ("6x64", "1x64", "7x64")
    batches = [example[0], example[0][[5]], example[0][[5, 0, 1, 2, 3, 4, 5]]]
    pairs = [(expected(model, encoded, x).double(), torch.from_numpy(run(path, x)).double()) for x in batches]
    assert certificate.max_relative_error == max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    one, two = (torch.cat(side).softmax(-1) for side in zip(*pairs, strict=True))
    kl = (one * (one / two).log()).sum(-1).mean().item()
    # both are differences of numbers near one in float64: 1e-15 is their rounding
    assert abs(certificate.kl - max(kl, 0)) < 1e-15
    assert certificate.version == onnxruntime.__version__


def test_every_open_axis_is_run_at_another_length(case):
    model, encoded, example, path, _ = case("language")
    assert sw.verify(path, model, example, encoded).inputs == ("2x7", "1x7", "3x7", "2x3")
    model, encoded, example, path, _ = case("symmetric, one row")
    assert sw.verify(path, model, example, encoded).inputs == ("1x64", "2x64")


def test_tolerance_follows_the_stated_rule(case):
    for name in ("mlp", "language"):
        model, encoded, example, path, _ = case(name)
        certificate = sw.verify(path, model, example, encoded)
        assert certificate.tolerance == max(2e-6, 4 * certificate.noise)


def test_noise_is_the_error_of_a_float32_sum():
    x, layer = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), nn.Linear(512, 64)
    with torch.no_grad():
        plain = layer(x)
        with SinglyRounded():
            exact = layer(x)
        double = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert torch.equal(exact, double.float())  # a single operation: rounded once
    assert not torch.equal(plain, exact)


def test_singly_rounded_leaves_views_writes_and_doubles_alone():
    x = torch.arange(6.0).reshape(2, 3)
    with torch.no_grad(), SinglyRounded():
        view = x[0]
        view += 1
        doubles = torch.ones(3, dtype=torch.float64) / 3, x.double() / 3, x.sum(dtype=torch.float64)
    assert x[0].tolist() == [1.0, 2.0, 3.0]
    assert {double.dtype for double in doubles} == {torch.float64}


def tampered(path, target, change) -> None:
    """Copy a file with one constant changed."""
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    for tensor in model.graph.initializer:
        if tensor.name in (*node.input, "0.bias", "2.weight", "5.bias"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            change(tensor.name, array)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, str(target))


def test_one_code_is_found(case, tmp_path):
    model, encoded, example, path, _ = case("mlp")

    def change(name, array):
        if name == "0.weight.codes":
            array[7, 1, 3] ^= 0x10

    tampered(path, tmp_path / "m.onnx", change)
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert (certificate.passed, certificate.codes_equal, certificate.scales_equal, certificate.values_equal) == (False, False, True, False)
    layers = {layer.name: layer for layer in certificate.layers}
    assert layers["0.weight"].note == f"1 of {96 * 64} codes differ"
    assert layers["3.weight"].codes_equal
    assert "NOT PASSED" in str(certificate)
    assert "DIFFER" in str(certificate)


def test_one_scale_off_by_one_ulp_is_found(case, tmp_path):
    model, encoded, example, path, _ = case("mlp")

    def change(name, array):
        if name == "0.weight.scales":
            array[11] = np.nextafter(array[11], np.float32(np.inf))

    tampered(path, tmp_path / "m.onnx", change)
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert (certificate.passed, certificate.codes_equal, certificate.scales_equal) == (False, True, False)
    assert certificate.max_relative_error <= certificate.tolerance  # the outputs alone would not have told
    assert certificate.layers[0].note == f"1 of {96 * 2} scales differ"


def test_one_zero_point_is_found(case, tmp_path):
    model, encoded, example, path, _ = case("Conv1D")

    def change(name, array):
        if name.endswith(".zero_points"):
            array[0] ^= 1

    tampered(path, tmp_path / "m.onnx", change)
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert (certificate.passed, certificate.codes_equal, certificate.scales_equal) == (False, False, True)


def test_float_part_is_found_by_value_or_by_outputs(case, tmp_path):
    model, encoded, example, path, _ = case("convolution")

    def weight(name, array):
        if name == "2.weight":
            array.flat[0] += 1e-7

    tampered(path, tmp_path / "m.onnx", weight)
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert (certificate.passed, certificate.codes_equal, certificate.values_equal) == (False, True, False)

    def bias(name, array):
        if name == "5.bias":
            array += 0.01

    tampered(path, tmp_path / "m.onnx", bias)
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert (certificate.passed, certificate.codes_equal, certificate.values_equal) == (False, True, True)
    assert certificate.max_relative_error > certificate.tolerance


def test_outputs_that_are_not_numbers_do_not_pass(case, tmp_path):
    model, encoded, example, path, _ = case("mlp")

    def change(name, array):
        if name == "0.bias":
            array[:] = np.nan

    tampered(path, tmp_path / "m.onnx", change)
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert not certificate.passed
    assert json.loads(certificate.to_json())["max_relative_error"] is None


def test_activations_rounded_inside_the_kernel_are_found(case, tmp_path):
    """Accuracy level 4 multiplies 8-bit activations: codes and scales are equal, the outputs are not."""
    model, encoded, example, path, _ = case("mlp")
    file = onnx.load(str(path))
    for node in file.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4
    onnx.save(file, str(tmp_path / "m.onnx"))
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert certificate.codes_equal
    assert certificate.scales_equal
    assert not certificate.exact
    assert "passed, the difference explained" in str(certificate)
    assert certificate.remainder <= certificate.tolerance
    assert 1e-4 < certificate.max_relative_error < 1e-1


def test_without_encoded_the_model_itself_is_compared(case):
    model, _, example, path, _ = case("mlp")
    certificate = sw.verify(path, model, example)
    assert (certificate.passed, certificate.codes_equal, certificate.scales_equal, certificate.values_equal) == (True, None, None, True)
    torch.manual_seed(1)
    other = sw.verify(path, nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(), nn.Linear(96, 10, bias=False)), example)
    assert (other.passed, other.values_equal) == (False, False)


def test_other_codes_missing_and_surplus_weights_are_found(case):
    model, encoded, example, path, _ = case("mlp")
    fewer = sw.verify(path, model, example, {"0.weight": encoded["0.weight"]})
    assert not fewer.passed
    assert fewer.layers[-1].note == "in the file, but not in `encoded`"
    other = {**encoded, "3.weight": sw.int8().encode(model[3].weight)}
    assert not sw.verify(path, model, example, other).passed
    file, names = case("twins"), ("one.weight", "two.weight")
    moved = {**file.encoded, "two.weight": sw.int4().encode(2 * file.model.two.weight)}
    layers = {layer.name: layer for layer in sw.verify(file.path, file.model, file.example, moved).layers}
    assert [layers[name].codes_equal and layers[name].scales_equal for name in names] == [True, False]


def test_files_of_others_are_matched_by_value(case, tmp_path):
    model, encoded, example, path, _ = case("mlp")
    file = onnx.load(str(path))
    del file.metadata_props[:]
    for index, node in enumerate(file.graph.node):
        node.name = f"node_{index}"
    onnx.save(file, str(tmp_path / "m.onnx"))
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert certificate.passed
    assert [layer.nodes for layer in certificate.layers] == [1, 1]
    assert sw.verify(tmp_path / "m.onnx", model, example).passed


def test_certificate_is_plain_data_and_readable(case):
    model, encoded, example, path, _ = case("convolution")
    certificate = sw.verify(path, model, example, encoded)
    data = json.loads(certificate.to_json())
    assert data == certificate.to_dict()
    assert data["passed"] is True
    assert len(data["sha256"]) == 64
    assert [layer["name"] for layer in data["layers"]] == list(encoded)
    text = str(certificate)
    assert text.splitlines()[0].endswith("passed")
    assert all(len(line) < 200 for line in text.splitlines())


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [(None, FileNotFoundError, "no file"), (b"\xff\xff\xff", ValueError, "not a readable"), (b"", ValueError, "does not load")],
)
def test_unreadable_files_are_refused(case, tmp_path, content, error, words):
    model, encoded, example, _, _ = case("mlp")
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words):
        sw.verify(path, model, example, encoded)


def test_bad_arguments_are_refused(case, tmp_path, monkeypatch):
    model, encoded, example, path, _ = case("mlp")
    with pytest.raises(ValueError, match=r"`path` must be an .onnx file, a .gguf"):
        sw.verify(tmp_path / "m.bin", model, example, encoded)
    with pytest.raises(ValueError, match="`example` must hold 1 tensors"):
        sw.verify(path, lambda_model(), (example[0], example[0]))
    with pytest.raises(TypeError, match="`example` must be a tuple"):
        sw.verify(path, model, example[0], encoded)
    with pytest.raises(ValueError, match="same floating-point outputs"):
        sw.verify(path, nn.Sequential(nn.Linear(64, 7)), example)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r'onnxruntime.*pip install "stepwell\[onnx\]"'):
        sw.verify(path, model, example, encoded)


def test_a_file_without_quantized_weights_certifies_nothing(case, tmp_path):
    model, encoded, example, _, _ = case("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(copy.deepcopy(model).eval(), example, tmp_path / "float.onnx", dynamo=True, verbose=False, external_data=False)
    certificate = sw.verify(tmp_path / "float.onnx", model, example)
    assert (certificate.codes_equal, certificate.scales_equal, certificate.values_equal) == (None, None, None)
    assert (certificate.passed, certificate.layers) == (False, ())
    assert certificate.max_relative_error <= certificate.tolerance  # the outputs are equal, and that is all
    text = str(certificate)
    assert "no quantized weight was found in the file: nothing was compared but outputs" in text
    assert "NOT PASSED" in text
    assert "largest difference" in text
    missing = sw.verify(tmp_path / "float.onnx", model, example, encoded)
    assert (missing.passed, missing.values_equal) == (False, False)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ((torch.ones(4, 63),), "the model does not run on inputs of shape 4x63.*mat1 and mat2"),
        (
            (torch.ones(64),),
            ".*m.onnx does not run on inputs of shape 64.*onnxruntime says: .*rank",
        ),  # torch takes a row, the file does not
        ((torch.ones(4, 64, dtype=torch.long),), "the model does not run on inputs of shape 4x64.*dtype"),
    ],
)
def test_an_example_that_does_not_fit_is_named(case, tmp_path, example, said):
    model, encoded, _, path, _ = case("mlp")
    shutil.copy(path, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=f"`example`: {said}"):
        sw.verify(tmp_path / "m.onnx", model, example, encoded)


def lambda_model() -> nn.Module:
    """Return a model of two inputs."""

    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    return Sum()
