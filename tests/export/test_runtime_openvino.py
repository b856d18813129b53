"""OpenVINO reads both ONNX forms: exactly what was trained with two hints, and not without them. Optional: pip install openvino."""

import numpy as np
import pytest
import torch
from torch import nn

import stepwell as sw

from .conftest import expected
from .test_onnx_architectures import FORMS, tokens, transformer

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.slow
# else bfloat16 where the processor has it, and activations rounded to int8
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def error(path, hints: dict[str, str], reference: np.ndarray, *inputs: torch.Tensor) -> float:
    """Return OpenVINO's largest difference, relative to the largest output."""
    compiled = openvino.compile_model(str(path), "CPU", hints)
    found = compiled([value.numpy() for value in inputs])[0]
    return float(np.abs(found - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_transformers_are_exact_with_two_hints(tmp_path, form, kind):
    model = transformer(kind)
    encoded = sw.ptq.rtn(model, sw.target(f"onnx:{form}"))
    FORMS[form](model, encoded, (tokens(1, 9),), tmp_path / "m.onnx", sequence=1)
    with torch.no_grad():
        reference = model(tokens(3, 17)).logits.numpy()  # `rtn` left the grid weights in place
    assert error(tmp_path / "m.onnx", EXACT, reference, tokens(3, 17)) < 5e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions_are_exact_with_two_hints(tmp_path, bits):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), torch.randn(4, 3, 8, 8)
    model(torch.randn(64, 3, 8, 8))
    encoded = sw.ptq.rtn(model, sw.intn(bits, block="channel"))
    sw.export.onnx_qdq(model, encoded, (x,), tmp_path / "m.onnx")
    assert error(tmp_path / "m.onnx", EXACT, expected(model, encoded, x).numpy(), x) < 5e-6
