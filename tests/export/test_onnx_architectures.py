"""Architectures that people have, in both ONNX forms: small transformers and a convolutional network, exported, compared, explained."""

import copy

import numpy as np
import onnx_ir
import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.export.onnx_write import write

from .test_qdq import error, run

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 96, "bos_token_id": None, "eos_token_id": None}
KINDS = {
    "LlamaForCausalLM": {**SIZES, "num_key_value_heads": 2},
    "Olmo2ForCausalLM": SIZES,
    "Qwen3ForCausalLM": {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "BertForSequenceClassification": {**SIZES, "num_labels": 5},
    "GPT2LMHeadModel": GPT2,
}
FORMS = {"matmulnbits": sw.export.onnx, "qdq": sw.export.onnx_qdq}


def transformer(kind: str) -> nn.Module:
    """Return a small model of transformers, its cache not switched off, matrices three times as large so that they matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(
        getattr(transformers, f"{kind.partition('For')[0].removesuffix('LMHeadModel')}Config")(**KINDS[kind])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    return model.eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(rows))


def check(model: nn.Module, form: str, path, *, rows: int = 1, bits: int = 4) -> None:
    """Export with an example of some rows, run it at another batch and length, and certify it."""
    encoded = sw.ptq.rtn(model, sw.target(f"onnx:{form}", bits=bits))
    exported = FORMS[form](model, encoded, (tokens(rows, 9),), path, sequence=1)
    assert set(exported.products) == set(encoded)
    assert exported.floats == {}
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, weight in encoded.items():
            reference.get_parameter(name).copy_(weight.decode())
    longer = tokens(3, 17)
    expected_logits = reference(longer).logits.detach().numpy()
    found = run(path, longer)
    # forty operations on sums of at most 96 float32 products, and the softmax between them: a tenth of what the demo allows
    assert np.abs(found - expected_logits).max() < 5e-6 * np.abs(expected_logits).max()
    certificate = sw.verify(path, model, (tokens(2, 9),), encoded)
    assert certificate.passed
    assert certificate.exact
    assert certificate.codes_equal is certificate.scales_equal is True
    assert all(layer.kernel == "float32" and layer.modelled < 1e-5 for layer in certificate.layers)
    assert len(certificate.causes) == (form == "qdq")


def test_a_small_llama_runs_as_matmulnbits(tmp_path):
    model = transformer("LlamaForCausalLM")
    check(model, "matmulnbits", tmp_path / "m.onnx")
    assert model.config.use_cache is True


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_architecture_runs_in_both_forms(tmp_path, kind, form, bits):
    check(transformer(kind), form, tmp_path / "m.onnx", rows=2, bits=bits)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_rounded_activations_are_explained_in_a_transformer(tmp_path, kind, bits, scheme):
    model = transformer(kind)
    sw.quantize_activations(model, calibrate=[tokens(4, 16)] if scheme == "static" else None)
    encoded = sw.ptq.rtn(model, sw.intn(bits, block="channel"))
    sw.export.onnx_qdq(model, encoded, (tokens(2, 9),), tmp_path / "m.onnx", sequence=1)
    certificate = sw.verify(tmp_path / "m.onnx", model, (tokens(2, 9),), encoded)
    assert certificate.passed
    assert certificate.codes_equal
    assert all(layer.modelled < 1e-5 for layer in certificate.layers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_exported_in_float32(tmp_path, dtype):
    model = transformer("LlamaForCausalLM").to(dtype)
    encoded = sw.ptq.rtn(model, sw.target("onnx:matmulnbits"))
    sw.export.onnx(model, encoded, (tokens(1, 9),), tmp_path / "m.onnx", sequence=1)
    assert sw.verify(tmp_path / "m.onnx", model, (tokens(2, 9),), encoded).passed
    assert model.lm_head.weight.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_convolutional_network_with_batch_norm_keeps_its_codes(tmp_path, bits):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip
    model(torch.randn(64, 3, 8, 8))  # fills the running statistics
    encoded = sw.ptq.rtn(model, sw.intn(bits, block="channel"))
    exported = sw.export.onnx_qdq(model, encoded, (torch.randn(1, 3, 8, 8),), tmp_path / "m.onnx")
    assert (set(exported.products), exported.floats) == (set(encoded), {})
    assert error(tmp_path / "m.onnx", model, encoded, torch.randn(5, 3, 8, 8)) < 1e-6
    assert sw.verify(tmp_path / "m.onnx", model, (torch.randn(4, 3, 8, 8),), encoded).passed


def test_what_exceeds_one_file_goes_into_two(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x, path = nn.Sequential(nn.Linear(64, 256)), torch.randn(2, 64), tmp_path / "m.onnx"
    encoded = sw.ptq.rtn(model, sw.int4())
    monkeypatch.setattr("stepwell.export.onnx_write.LARGEST", 4096)  # bytes in place of two gigabytes
    sw.export.onnx(model, encoded, (x,), path)
    [data] = tmp_path.glob("m.onnx.*.data")
    assert path.stat().st_size < 8192 <= data.stat().st_size  # codes and scales lie in the second
    assert error(path, model, encoded, x) < 1e-6
    first = sw.verify(path, model, (x,), encoded)
    assert first.passed
    content = data.read_bytes()
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    tampered = sw.verify(path, model, (x,), encoded)
    assert not tampered.passed
    assert tampered.sha256 != first.sha256  # the sum is of both files
    data.write_bytes(content)
    theirs = tmp_path / "m.onnx.notes.data"
    theirs.write_bytes(b"of somebody else")
    graph = onnx_ir.load(str(path))
    before = {part: part.read_bytes() for part in tmp_path.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            write(graph, path)
    assert {part: part.read_bytes() for part in tmp_path.iterdir()} == before
    write(graph, path)
    assert not data.exists()
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == 2  # the new one, and that of somebody else
    assert error(path, model, encoded, x) < 1e-6
    monkeypatch.undo()
    sw.export.onnx(model, encoded, (x,), path)  # small again: one file, and the data file is gone
    assert sorted(part.name for part in tmp_path.iterdir()) == ["m.onnx", "m.onnx.notes.data"]
    assert error(path, model, encoded, x) < 1e-6
