"""Plain codes: the file of `stepwell.save` is an artifact like any other, and `verify` checks it."""

import copy

import pytest
import torch
from torch import nn

import stepwell as sw


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


@pytest.mark.parametrize(
    "grid",
    [sw.int3(block=9), sw.ternary(block="channel"), sw.intn(5, block=None, levels="mid"), sw.int4(block=9, levels="affine"), sw.fp8()],
    ids=str,
)
def test_codes_of_any_model_and_grid_round_trip(grid, tmp_path):
    model, x = network(), torch.randn(3, 1, 8, 8)
    encoded = sw.ptq.rtn(copy.deepcopy(model), grid)
    sw.save(encoded, tmp_path / "m.safetensors")
    certificate = sw.verify(tmp_path / "m.safetensors", model, (x,), encoded)
    assert certificate.passed
    assert certificate.codes_equal is certificate.scales_equal is certificate.values_equal is True
    assert certificate.max_relative_error == 0
    assert [layer.name for layer in certificate.layers] == list(encoded)


def test_other_weights_are_found(tmp_path):
    model, x = network(), torch.randn(3, 1, 8, 8)
    encoded = sw.ptq.rtn(copy.deepcopy(model), sw.int4(block=9))
    sw.save(encoded, tmp_path / "m.safetensors")
    changed = dict(encoded)
    codes = encoded["3.weight"].codes.clone()
    codes[0, 0] += 1 if codes[0, 0] < 7 else -1
    changed["3.weight"] = encoded["3.weight"]._replace(codes=codes)
    certificate = sw.verify(tmp_path / "m.safetensors", model, (x,), changed)
    assert (certificate.passed, certificate.codes_equal, certificate.scales_equal) == (False, False, True)
    finer = {**encoded, "0.weight": sw.int8(block=9).encode(model[0].weight)}
    layers = {layer.name: layer for layer in sw.verify(tmp_path / "m.safetensors", model, (x,), finer).layers}
    assert layers["0.weight"].note == "encoded as int8 block 9, absmax fp32 scales"
    assert layers["3.weight"].codes_equal
    fewer = sw.verify(tmp_path / "m.safetensors", model, (x,), {"3.weight": encoded["3.weight"]})
    assert [layer.note for layer in fewer.layers] == ["", "in the file, but not in `encoded`"]
    assert not fewer.passed
    assert not sw.verify(tmp_path / "m.safetensors", model, (x,)).passed  # the float model
    sw.save({"0.weight": encoded["0.weight"]}, tmp_path / "one.safetensors")
    assert not sw.verify(tmp_path / "one.safetensors", model, (x,), encoded).passed


def test_what_is_no_artifact_is_refused(tmp_path):
    model, x = network(), torch.randn(3, 1, 8, 8)
    sw.save(sw.int4(block=9).encode(model[3].weight), tmp_path / "single.safetensors")
    with pytest.raises(ValueError, match="holds one weight without a name"):
        sw.verify(tmp_path / "single.safetensors", model, (x,))
    sw.save({"elsewhere": sw.int4(block=9).encode(model[3].weight)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'elsewhere', which `model` does not have"):
        sw.verify(tmp_path / "other.safetensors", model, (x,))
    for name in ("m.pt", "m.bin", "none"):
        with pytest.raises(ValueError, match=rf"`path` must be an .onnx file, a .gguf file, a .safetensors.*{name}, which is not there"):
            sw.verify(tmp_path / name, model, (x,))
