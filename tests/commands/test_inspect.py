"""`stepwell inspect` on everything that holds quantized weights: sizes against arithmetic, kinds by their own libraries' files."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file


def told(run, path):
    code, out, error = run("inspect", path, "--json")
    assert (code, error) == (0, "")
    return json.loads(out)


def test_gguf_tensors_have_the_bits_of_their_blocks(run, tmp_path):
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for name in ("Q4_0", "Q8_0", "MXFP4"):
        kind = GGMLQuantizationType[name]
        writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("norm.weight", weight[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = told(run, tmp_path / "m.gguf")
    assert found["kind"] == "GGUF, architecture llama"
    rows = {row["name"]: (row["type"], row["shape"], row["bits_per_weight"]) for row in found["weights"]}
    # a block of 32: 4 or 8 bits each, and a scale of 16 bits, or of 8 for MXFP4
    assert rows == {
        "Q4_0.weight": ("Q4_0", [8, 64], 4.5),
        "Q8_0.weight": ("Q8_0", [8, 64], 8.5),
        "MXFP4.weight": ("MXFP4", [8, 64], 4.25),
        "norm.weight": ("F32", [64], 32.0),
    }


@pytest.mark.parametrize(("kind", "bits", "per"), [("INT4", 4, 0.5), ("UINT8", 8, 1), ("INT2", 2, 0.25)])
def test_dequantized_weights_of_an_onnx_model_are_rows(run, tmp_path, kind, bits, per):
    code = getattr(TensorProto, kind)
    tensors = [
        helper.make_tensor("q", code, [6, 32], bytes(int(6 * 32 * per)), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, [6, 2], bytes(48), raw=True),
        helper.make_tensor("bias", TensorProto.INT32, [6], bytes(24), raw=True),
        helper.make_tensor("one", TensorProto.FLOAT, [], bytes(4), raw=True),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1, block_size=16),
        helper.make_node("DequantizeLinear", ["bias", "one"], ["b"]),
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 32), ("y", 6))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)), str(tmp_path / "m.onnx"))
    found = told(run, tmp_path / "m.onnx")
    assert found["kind"] == "ONNX model with DequantizeLinear"
    size = 6 * 32 * per + 48
    assert found["weights"] == [
        {"name": "q", "shape": [6, 32], "bits": bits, "block": 16, "zero_points": False, "bytes": size, "bits_per_weight": 8 * size / 192}
    ]


def test_a_folder_of_packed_weights_has_one_row_per_weight(run, tmp_path):
    tensors = {
        "a.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
        "a.weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([8, 32]),
        "b.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        "b.weight_scale": torch.ones(4, 1),
        "norm.weight": torch.ones(8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = told(run, tmp_path)
    assert found["kind"] == "compressed-tensors folder, pack-quantized"
    assert found["notes"] == ["1 tensors in float."]
    rows = {row["name"]: (row["codes"], row["scales"], row["bytes"]) for row in found["weights"]}
    assert rows == {
        "a.weight": ("I32 8x4", "BF16 8x1", 8 * 4 * 4 + 8 * 2 + 16),
        "b.weight": ("F8_E4M3 4x4", "F32 4x1", 16 + 16),
    }
    (tmp_path / "config.json").write_text("{}")
    found = told(run, tmp_path)
    assert (found["kind"], len(found["weights"])) == ("float checkpoint", 6)


def test_an_artifact_is_shown_with_its_certificate(run, tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(
        "import torch\n"
        "def made():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Linear(32, 4)\n"
        "    return model, lambda m, b: m(b).square().mean(), [torch.ones(2, 32), torch.zeros(2, 32)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run("quantize", "made.py:made", "out", "--target", "safetensors", "--method", "rtn")[0] == 0
    found = told(run, "out")
    assert found["kind"] == "encoded weights"
    assert [row["bits_per_weight"] for row in found["weights"]] == [5.0]
    assert found["notes"][0].startswith("encoded.safetensors of out, for safetensors. Certificate: passed, by PyTorch")
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    held = json.loads((tmp_path / "out" / "certificate.json").read_text())
    for change in ({"file": "../../made.py"}, {"file": 3}, {"certificate": None}):
        (tmp_path / "out" / "certificate.json").write_text(json.dumps(held | change))
        code, out, error = run("inspect", "out")
        assert (code, out) == (2, "")
        assert "is no certificate of `stepwell quantize`" in error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.gguf", b"GGUF\x03\0\0\0", "m.gguf"),
        ("m.gguf", b"", "m.gguf"),
        ("m.onnx", b"\x08\x01", "ONNX"),
        ("m.pt", b"\x80\x04", "m.pt is a pickle, which can run code"),
        ("m.bin", b"", "m.bin is a pickle"),
        ("m.safetensors", b"\xff" * 20, "m.safetensors is not a readable safetensors file"),
        ("missing.gguf", None, "nothing at missing.gguf"),
    ],
)
def test_what_cannot_be_read_is_one_line(run, tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, error = run("inspect", name)
    if code == 0:  # two bytes of a protocol buffer are an empty model
        assert words in out
        return
    assert (code, out) == (2, "")
    assert words in error
    assert error.startswith("stepwell: `file`: ")
    assert error.count("\n") == 1
