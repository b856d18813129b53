"""What a certificate says about the difference: kernels modelled one by one, causes switched off, and kernels that nobody knows."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

import stepwell as sw
from stepwell.export import nbits
from stepwell.export.onnx_layers import per_block, static

from .conftest import expected, mlp
from .test_qdq import error


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return one model in three files: float32 products, int8 products, DequantizeLinear."""
    torch.manual_seed(0)
    model, example = mlp(), (torch.randn(6, 64),)
    encoded = sw.ptq.rtn(model, sw.target("onnx:matmulnbits"))
    folder = tmp_path_factory.mktemp("causes")
    sw.export.onnx(model, encoded, example, folder / "float32.onnx")
    sw.export.onnx(model, encoded, example, folder / "int8.onnx", compute="int8")
    sw.export.onnx_qdq(model, encoded, example, folder / "qdq.onnx")
    return folder, model, encoded, example


def test_float32_kernels_are_named_and_need_no_cause(made):
    folder, model, encoded, example = made
    certificate = sw.verify(folder / "float32.onnx", model, example, encoded)
    assert certificate.passed
    assert certificate.exact
    assert certificate.causes == ()
    assert [layer.kernel for layer in certificate.layers] == ["float32", "float32"]
    assert max(layer.modelled for layer in certificate.layers) < 1e-6


def test_int8_kernels_are_modelled_and_account_for_all(made):
    folder, model, encoded, example = made
    certificate = sw.verify(folder / "int8.onnx", model, example, encoded)
    assert not certificate.exact
    assert certificate.passed
    assert "passed, the difference explained" in str(certificate)
    [cause] = certificate.causes
    assert cause.before == certificate.max_relative_error
    assert cause.before > 1e-4  # rounding to 127 steps moves outputs by about 1/254 over the root of the inputs
    assert cause.after == certificate.remainder <= certificate.tolerance
    assert cause.name.startswith("int8 activations in 2 of 2 products")
    for layer in certificate.layers:
        assert layer.kernel == "int8 activations per block of 32"
        assert layer.modelled < 1e-6


def test_the_default_of_dequantize_linear_is_recorded_beside_the_exact_setting(made):
    folder, model, encoded, example = made
    certificate = sw.verify(folder / "qdq.onnx", model, example, encoded)
    assert certificate.exact
    assert certificate.passed
    assert "session.qdq_matmulnbits_accuracy_level=1" in certificate.runtime
    [cause] = certificate.causes
    assert cause.after == certificate.max_relative_error
    by_hand = max(
        error(folder / "qdq.onnx", model, encoded, inputs, level=None)
        for inputs in (example[0], example[0][[5]], example[0][[5, *range(6)]])
    )
    assert abs(cause.before - by_hand) < 1e-6 * by_hand  # float32 against float64 differences
    assert cause.before > 1000 * cause.after
    assert [layer.kernel for layer in certificate.layers] == ["float32", "float32"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_model_of_the_rounding_kernel_is_the_kernel(bits, block):
    generator = torch.Generator().manual_seed(0)
    held = nbits.hold(sw.intn(bits, block=block, levels="affine").encode(torch.randn(24, 256, generator=generator)))
    parts = nbits.to_inputs(held)
    node = helper.make_node(
        "MatMulNBits", ["A", *parts], ["Y"], domain="com.microsoft", N=24, K=256, bits=bits, block_size=block, accuracy_level=4
    )
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size]) for name, size in (("A", 256), ("Y", 24))]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in parts.items()]
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], constants), opset_imports=versions, ir_version=10)
    inputs = torch.randn(5, 256, generator=generator).numpy()
    inputs[3, :block] = 0  # a block without a scale
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"A": inputs})[0]
    modelled = per_block(inputs, block) @ held.decode().astype(np.float64).T
    largest = np.abs(modelled).max()
    assert np.abs(found - modelled).max() < 1e-5 * largest
    assert np.abs(found - inputs.astype(np.float64) @ held.decode().astype(np.float64).T).max() > 1e-4 * largest


@pytest.mark.parametrize("zero", [np.int8(0), np.uint8(120)])
def test_the_model_of_quantize_linear_is_the_operator(zero):
    scale, inputs = np.float32(0.037), torch.randn(400, 16, generator=torch.Generator().manual_seed(0)).numpy()
    inputs[0] = (np.arange(16) - 8 + 0.5) * 0.037  # near ties, and beyond the ends
    inputs[1] = np.linspace(-9, 9, 16)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 16]) for name in "xy"]
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (("scale", scale), ("zero", zero))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": inputs})[0]
    assert np.array_equal(static(inputs, np.asarray(scale), np.asarray(zero)).astype(np.float32), found)


def test_a_kernel_that_computes_something_else_is_not_passed(made, tmp_path, monkeypatch):
    """The rounding is switched off and the outputs agree, but on its own inputs a kernel is not what it was taken for."""
    folder, model, encoded, example = made
    monkeypatch.setattr("stepwell.export.onnx_layers.per_block", lambda inputs, block: inputs.astype(np.float64) * 1.001)
    certificate = sw.verify(folder / "int8.onnx", model, example, encoded)
    assert certificate.remainder <= certificate.tolerance
    assert not certificate.passed


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.dilated = nn.Conv1d(6, 6, 3, dilation=2, bias=False)

    def forward(self, x):
        return self.dilated(self.layer(x).relu().flatten(2))


def test_convolutions_are_modelled_too(tmp_path):
    torch.manual_seed(0)
    model, example = Convolution(), (torch.randn(2, 4, 9, 9),)
    encoded = sw.ptq.rtn(model, sw.int4(block="channel"))
    sw.export.onnx_qdq(model, encoded, example, tmp_path / "m.onnx")
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert certificate.passed
    assert certificate.causes == ()  # nothing that onnxruntime would fuse
    assert all(layer.kernel == "float32" and layer.modelled < 1e-6 for layer in certificate.layers)
    assert expected(model, encoded, *example).shape[1:] == (6, 21)
