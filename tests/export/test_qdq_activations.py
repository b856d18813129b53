"""Rounded activations in the file: the operators that are there, what runs, and a certificate that tells ties, biases and kernels apart."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.activations import without_rounding

from .conftest import expected, run

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def built(kind: str, grid) -> tuple[nn.Module, dict[str, sw.Encoded]]:
    """Return an mlp with rounded activations and its encoded weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    sw.quantize_activations(model, calibrate=[X] if kind == "static" else None)
    return model, sw.ptq.rtn(model, grid)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "block"), [(8, "channel"), (4, 32), (8, 32)])
def test_static_activations_become_pairs_of_operators(tmp_path, bits, block):
    model, encoded = built("static", sw.intn(bits, block=block))
    exported = sw.export.onnx_qdq(model, encoded, (X,), tmp_path / "m.onnx")
    assert exported.products == {"0.weight": 1, "2.weight": 1, "4.weight": 1}
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    hooks = [next(iter(model[place]._forward_pre_hooks.values())).range for place in (0, 2, 4)]
    assert [(float(tensors[node.input[1]]), int(tensors[node.input[2]]) - 128) for node in pairs] == hooks
    certificate = sw.verify(tmp_path / "m.onnx", model, (X,), encoded)
    assert certificate.passed
    assert certificate.codes_equal is certificate.scales_equal is True
    assert certificate.causes[-1].after <= certificate.tolerance < 1e-5  # with activations in float32 the file is the model
    assert all(
        layer.kernel.startswith("activations that the file rounds to uint8") and layer.modelled < 1e-5 for layer in certificate.layers
    )
    with without_rounding(model):
        assert not sw.verify(tmp_path / "m.onnx", model, (X,), encoded).exact  # the rounding is in the file


def test_biases_that_onnxruntime_rounds_are_a_cause_of_their_own(tmp_path):
    """A Gemm of rounded activations before a ReLU: onnxruntime 1.31 stores its bias in steps of both scales multiplied."""
    model, encoded = built("static", sw.int4(block="channel"))
    sw.export.onnx_qdq(model, encoded, (X,), tmp_path / "m.onnx")
    certificate = sw.verify(tmp_path / "m.onnx", model, (X,), encoded)
    kernels = {layer.name: layer.kernel for layer in certificate.layers}
    assert kernels["2.weight"].endswith("a bias that onnxruntime rounds to int32")
    assert "bias" not in kernels["4.weight"]
    cause = next(cause for cause in certificate.causes if cause.name.startswith("biases of 1 products"))
    assert cause.before == certificate.max_relative_error
    assert cause.after < cause.before
    assert certificate.passed
    assert certificate.remainder <= certificate.tolerance


def test_dynamic_activations_are_exported_as_arithmetic(tmp_path):
    model, encoded = built("dynamic", sw.target("onnx:matmulnbits"))
    sw.export.onnx(model, encoded, (X,), tmp_path / "m.onnx")
    operators = {node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert {"ReduceMax", "Round", "MatMulNBits"} <= operators
    assert "QuantizeLinear" not in operators
    certificate = sw.verify(tmp_path / "m.onnx", model, (X,), encoded)
    assert certificate.passed
    assert [layer.kernel for layer in certificate.layers] == ["activations that the file rounds to int8 per token"] * 3
    assert max(layer.modelled for layer in certificate.layers) < 1e-5
    assert certificate.causes[-1].after <= certificate.tolerance < 1e-5  # with activations in float32 the file is the model
    reference = expected(model, encoded, X)
    assert (
        np.abs(run(tmp_path / "m.onnx", X) - reference.numpy()).max()
        <= certificate.max_relative_error * reference.abs().max().item() * 1.001
    )


@pytest.mark.slow
def test_attention_keeps_its_ranges(tmp_path):
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 6, 32)
    sw.quantize_activations(model, calibrate=[x], skip=["self_attn.out_proj"])
    encoded = sw.ptq.rtn(model, sw.int8(block="channel"))
    sw.export.onnx_qdq(model, encoded, (x,), tmp_path / "m.onnx", sequence=1)
    operators = [node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert operators.count("QuantizeLinear") == 3
    certificate = sw.verify(tmp_path / "m.onnx", model, (x,), encoded)
    assert certificate.passed
    kernels = {layer.name: layer.kernel for layer in certificate.layers}
    assert kernels.pop("self_attn.out_proj.weight") == "float32"
    assert all(kernel.startswith("activations that the file rounds to uint8") for kernel in kernels.values())


def test_dynamic_activations_of_a_convolution_are_modelled_per_image(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)), torch.randn(3, 3, 6, 6)
    sw.quantize_activations(model)
    encoded = sw.ptq.rtn(model, sw.int8(block="channel"))
    sw.export.onnx_qdq(model, encoded, (x,), tmp_path / "m.onnx")
    certificate = sw.verify(tmp_path / "m.onnx", model, (x,), encoded)
    assert certificate.passed
    assert [layer.kernel for layer in certificate.layers] == ["activations that the file rounds to int8 per token"] * 2
    assert max(layer.modelled for layer in certificate.layers) < 1e-5


def test_a_wrong_scale_of_activations_does_not_pass(tmp_path):
    model, encoded = built("static", sw.int8(block="channel"))
    sw.export.onnx_qdq(model, encoded, (X,), tmp_path / "m.onnx")
    file = onnx.load(str(tmp_path / "m.onnx"))
    node = next(node for node in file.graph.node if node.op_type == "QuantizeLinear")
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == node.input[1])
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(onnx.numpy_helper.to_array(tensor) * np.float32(1.02)), tensor.name))
    onnx.save(file, str(tmp_path / "wrong.onnx"))
    certificate = sw.verify(tmp_path / "wrong.onnx", model, (X,), encoded)
    assert not certificate.exact
    assert not certificate.passed
    assert "its activations are rounded on Range" in certificate.layers[0].note
    assert certificate.layers[1].note == ""
