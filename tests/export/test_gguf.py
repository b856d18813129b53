"""GGUF: blocks as `gguf` decodes them, files that hold the codes that were trained, and damaged files that are refused."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import gguf as library
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import nn

import stepwell as sw
from stepwell.export import aside, gguf_blocks, gguf_file, gguf_names, llama_cpp
from stepwell.export.gguf import gguf as export
from stepwell.export.gguf_tokenizer import read_tokenizer

from .language import VARIANTS, language_model, tokens

KINDS = list(gguf_blocks.KINDS.values())


@pytest.fixture(autouse=True)
def _decoders_only(monkeypatch):
    """Compare outputs through `gguf`'s decoders, also where llama.cpp is installed; that is for test_runtime_llama_cpp."""
    monkeypatch.setattr(llama_cpp, "available", lambda: False)


def type_of(kind):
    return getattr(library.GGMLQuantizationType, kind.name)


def matrix(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("piece", [gguf_blocks.PIECE, 1280])  # all at once; in pieces, the last of which is smaller
def test_gguf_decodes_our_blocks_to_our_weights(kind, piece, monkeypatch):
    monkeypatch.setattr(gguf_blocks, "PIECE", piece)
    weight = matrix(6, 512)
    weight[0, :256] = 0  # scales of zero
    encoded = kind.target.quantizer.encode(weight)
    packed = gguf_blocks.pack(encoded, kind)
    assert packed.nbytes == weight.numel() // library.GGML_QUANT_SIZES[type_of(kind)][0] * library.GGML_QUANT_SIZES[type_of(kind)][1]
    assert np.array_equal(dequantize(packed, type_of(kind)), encoded.decode().numpy())
    held = gguf_blocks.unpack(packed, kind)
    assert np.array_equal(held.codes, encoded.codes.numpy())
    assert np.array_equal(held.scales, encoded.scales.numpy())


@pytest.mark.parametrize("name", ["Q4_1", "TQ1_0", "TQ2_0"])
def test_bytes_are_those_of_gguf_for_weights_on_the_grid(name):
    """These three fit the same scale to weights that lie on the grid, and have no ties there: the bytes are theirs, too."""
    kind = gguf_blocks.KINDS[name]
    encoded = kind.target.quantizer.encode(matrix(6, 512, seed=1))
    assert np.array_equal(gguf_blocks.pack(encoded, kind), quantize(encoded.decode().numpy(), type_of(kind)))


def test_other_levels_of_the_same_blocks_are_held():
    for grid in (sw.int4(scale_dtype="fp16"), sw.intn(8, levels="full", scale_dtype="fp16"), sw.mxfp4(rule="floor")):
        encoded = grid.encode(matrix(3, 64))
        kind = gguf_blocks.choose(encoded)
        assert np.array_equal(dequantize(gguf_blocks.pack(encoded, kind), type_of(kind)), encoded.decode().numpy())


def shipped(name, grid, path, **options):
    model = language_model(name)
    encoded = sw.ptq.rtn(copy.deepcopy(model), grid)
    return model, encoded, export(model, encoded, path, **options)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "wide llama"])
def test_every_architecture_round_trips(name, tmp_path):
    model, encoded, exported = shipped(name, sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    assert certificate.exact
    assert certificate.codes_equal is certificate.scales_equal is certificate.values_equal is True
    assert {layer.name for layer in certificate.layers if layer.nodes} == set(encoded)
    assert certificate.layers[-1].name.startswith("float part")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fields = gguf_file.read(exported.path).fields
    architecture = fields["general.architecture"]
    assert fields[f"{architecture}.attention.head_count_kv"] == 2
    assert fields["general.file_type"] == 2  # mostly Q4_0


@pytest.mark.parametrize("target", ["q4_1", "q8_0", "tq1_0", "tq2_0", "mxfp4"])
def test_every_block_type_round_trips(target, tmp_path):
    ternary = target if target.startswith("tq") else "tq2_0"
    model, encoded, exported = shipped("wide llama", sw.target(f"gguf:{target}"), tmp_path / "m.gguf", ternary=ternary)
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    assert {layer.grid.partition(",")[0] for layer in certificate.layers if layer.nodes} == {target.upper()}


def test_half_floats_are_a_named_cause(tmp_path):
    model, encoded, exported = shipped("llama", sw.target("gguf:q8_0"), tmp_path / "m.gguf", floats="f16")
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    assert not certificate.exact
    assert certificate.max_relative_error > 1e-5
    assert [(cause.name, cause.after) for cause in certificate.causes] == [("float16 storage", 0.0)]
    assert certificate.remainder == 0
    assert "passed, the difference explained" in str(certificate)
    assert "float16 storage" in str(certificate)
    assert json.loads(certificate.to_json())["causes"][0]["before"] == certificate.max_relative_error


def test_rows_of_llamas_queries_pair_neighbours_in_the_file(tmp_path):
    """llama.cpp rotates rows 2i and 2i+1 of a head together, transformers i and i + half: the file's row 1 is our row `half`."""
    _, encoded, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    file = gguf_file.read(exported.path)
    stored = torch.from_numpy(gguf_file.values(file.tensors["blk.0.attn_q.weight"]))
    own = encoded["model.layers.0.self_attn.q_proj.weight"].decode()
    half = 64 // 4 // 2
    assert torch.equal(stored[:4], own[[0, half, 1, half + 1]])
    assert torch.equal(stored[16:18], own[[16, 16 + half]])  # the second head
    assert torch.equal(
        torch.from_numpy(gguf_file.values(file.tensors["blk.0.attn_v.weight"])), encoded["model.layers.0.self_attn.v_proj.weight"].decode()
    )
    rows = torch.randn(24, 5)
    assert torch.equal(gguf_names.separate(gguf_names.interleave(rows, 3), 3), rows)


def test_scaled_frequencies_are_written_as_their_factors(tmp_path):
    _, _, exported = shipped("llama 3.1", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    factors = gguf_file.values(gguf_file.read(exported.path).tensors["rope_freqs.weight"])
    # Llama 3.1: fast frequencies stay, slow ones are divided by the factor, those between are blended
    assert factors[0] == pytest.approx(1.0, abs=1e-6)
    assert factors[-1] == pytest.approx(8.0, rel=1e-6)
    assert (np.diff(factors) >= -1e-6).all()


def test_tampering_is_found(tmp_path):
    model, encoded, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    reader = library.GGUFReader(exported.path)
    offset = {part.name: part.data_offset for part in reader.tensors}
    content = bytearray(exported.path.read_bytes())
    for name, place, told in (
        ("blk.1.attn_k.weight", 5, ("codes_equal", "1 of 2048 codes differ")),
        ("blk.1.ffn_up.weight", 0, ("scales_equal", "1 of 256 scales differ")),
        ("output_norm.weight", 2, ("values_equal", "model.norm.weight differs")),
    ):
        changed = bytearray(content)
        changed[offset[name] + place] ^= 1
        (tmp_path / "changed.gguf").write_bytes(changed)
        certificate = sw.verify(tmp_path / "changed.gguf", model, (tokens(),), encoded)
        assert not certificate.passed
        assert getattr(certificate, told[0]) is False
        assert [layer.note for layer in certificate.layers if layer.note] == [told[1]]


def test_without_encoded_the_model_itself_is_compared(tmp_path):
    model, encoded, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    assert not sw.verify(exported.path, model, (tokens(),)).passed  # the float model
    twin = copy.deepcopy(model)
    sw.ptq.rtn(twin, sw.target("gguf:q4_0"))
    certificate = sw.verify(exported.path, twin, (tokens(),))
    assert (certificate.passed, certificate.codes_equal, certificate.values_equal) == (True, None, True)
    fewer = dict(list(encoded.items())[1:])
    assert [layer.note for layer in sw.verify(exported.path, twin, (tokens(),), fewer).layers if layer.note] == [
        "in the file, but not in `encoded`"
    ]


def test_weights_may_come_from_elsewhere_one_at_a_time(tmp_path):
    model, encoded, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    empty = copy.deepcopy(model).to("meta")
    export(empty, encoded, tmp_path / "n.gguf", weights=dict(model.named_parameters()))
    assert (tmp_path / "n.gguf").read_bytes() == exported.path.read_bytes()
    with pytest.raises(ValueError, match=r"`weights` must hold 'model.embed_tokens.weight'"):
        export(empty, encoded, tmp_path / "n.gguf", weights={})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_gguf_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    model, path = language_model("llama"), tmp_path / "m.gguf"
    copied = copy.deepcopy(model)
    three = sw.ptq.rtn(copied, sw.int3(levels="full"))
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj.weight'.*GGUF has no block type.*hold int3.*compressed-tensors:int3"
    ):
        export(model, three, path)
    encoded = sw.ptq.rtn(copied, sw.target("gguf:q4_0"))
    for options, said in (({"floats": "bf16"}, "`floats`.*got 'bf16'"), ({"ternary": "q2"}, "`ternary`.*got 'q2'")):
        with pytest.raises(ValueError, match=said):
            export(model, encoded, path, **options)
    with pytest.raises(ValueError, match="`encoded` must hold at least one weight"):
        export(model, {}, path)
    other = nn.Sequential(nn.Linear(32, 4))
    with pytest.raises(
        ValueError, match=r"`model` must be a transformers model of type llama.*got a model without a config.*onnx:matmulnbits"
    ):
        export(other, sw.ptq.rtn(other, sw.target("gguf:q4_0")), path)
    rounding = sw.quantize_activations(copied)
    with pytest.raises(ValueError, match="`model` rounds the activations into 15 modules, which GGUF does not hold"):
        export(copied, encoded, path)
    rounding.remove()
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"`model.norm.weight` must be finite"):
        export(broken, encoded, path)
    sliding = copy.deepcopy(language_model("qwen2"))
    sliding.config.use_sliding_window = True
    with pytest.raises(ValueError, match="use_sliding_window"):
        export(sliding, sw.ptq.rtn(sliding, sw.target("gguf:q4_0")), path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(model, encoded, tmp_path / "none" / "m.gguf")
    large = copy.deepcopy(model)
    large.model.embed_tokens.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="`floats`='f16' overflows"):
        export(large, encoded, path, floats="f16")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model, encoded, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    before, written = exported.path.read_bytes(), []
    real = library.GGUFWriter.write_tensor_data

    def full(self, tensor, *arguments):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(tensor)
        return real(self, tensor, *arguments)

    monkeypatch.setattr(library.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        export(model, encoded, exported.path)
    assert exported.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [exported.path]


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused(count, tmp_path):
    _, _, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    content, path = exported.path.read_bytes(), tmp_path / "damaged.gguf"
    header = library.GGUFReader(exported.path).data_offset
    generator = np.random.default_rng(count)
    said = []
    for _ in range(count):
        changed = bytearray(content)
        if generator.random() < 0.2:
            changed = changed[: generator.integers(len(changed))]
        else:
            start = int(generator.integers(header - 8))
            changed[start : start + 8] = generator.bytes(8) if generator.random() < 0.5 else b"\xff" * 8
        path.write_bytes(changed)
        begin = time.monotonic()
        try:
            file = gguf_file.read(path)
            assert all(np.prod(part.shape) < 1e9 for part in file.tensors.values())
        except ValueError as error:
            said.append(str(error))
        assert time.monotonic() - begin < 5
    assert len(said) > count / 2
    assert all("is not a readable GGUF file" in words for words in said)
    with pytest.raises(FileNotFoundError):
        gguf_file.read(tmp_path / "none.gguf")


def tokenizer_json(**changes):
    return {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
        **changes,
    }


def test_tokenizer_is_written_or_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}, "bos_token": None}))
    found = read_tokenizer(tmp_path)
    assert found == ("gpt-2", ["a", "b", "ab", "<|end|>"], [1, 1, 1, 3], ["a b"], {"eos": 3})
    shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf", tokenizer=tmp_path)
    reader = library.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents() == found.tokens
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 3
    for changes, said in (
        ({"model": {"type": "Unigram"}}, "byte-level BPE"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "llama.cpp has no name for"),
        ({"added_tokens": [{"id": 7, "content": "x"}]}, "ids that are not 0 to 3"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
        with pytest.raises(ValueError, match=said):
            read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="`tokenizer`: no file"):
        read_tokenizer(tmp_path / "none")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_leaves_the_old_file(tmp_path):
    """The other process is killed after some tensors of the new file are written."""
    _, _, exported = shipped("llama", sw.target("gguf:q4_0"), tmp_path / "m.gguf")
    before = exported.path.read_bytes()
    program = (
        "import os, runpy, signal, sys; from pathlib import Path\n"
        "with runpy.run_path(sys.argv[2])['new_file'](Path(sys.argv[1])) as aside:\n"
        "    file = aside.open('wb'); file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, os.fspath(exported.path), aside.__file__], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert exported.path.read_bytes() == before
