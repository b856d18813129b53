"""Folders for transformers: compressed-tensors and torchao reload to the codes, scales and outputs of the model that was trained."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import stepwell as sw
from stepwell.export import compressed_tensors_scheme as schemes
from stepwell.export import hf_folder
from stepwell.export.compressed_tensors import compressed_tensors
from stepwell.export.torchao import torchao

from .language import SIZES, language_model, tokens

EXPORTS = {"compressed-tensors": compressed_tensors, "torchao": torchao}
NARROW = {"compressed-tensors:nvfp4", "compressed-tensors:mxfp4"}


def shipped(model, grid, folder, export=compressed_tensors, **options):
    encoded = sw.ptq.rtn(copy.deepcopy(model), grid)
    return encoded, export(model, encoded, folder, **options)


TARGETS = [row.name for row in sw.targets() if row.name.partition(":")[0] in EXPORTS]


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_round_trips(name, tmp_path):
    model = language_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    encoded, exported = shipped(model, sw.target(name), tmp_path / "out", EXPORTS[name.partition(":")[0]])
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    assert certificate.codes_equal is certificate.scales_equal is certificate.values_equal is True
    assert [layer.name for layer in certificate.layers if layer.nodes] == list(encoded) == list(exported.products)
    assert certificate.exact == (name not in NARROW)
    if name in NARROW:  # decoded to bfloat16, so the model runs in it: a reference that does so too agrees to the bit
        assert [(cause.name, cause.after) for cause in certificate.causes] == [("bfloat16 arithmetic", 0.0)]
        assert 1e-4 < certificate.max_relative_error < 5e-2
    else:
        assert certificate.max_relative_error == 0  # the same operations on the same numbers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", EXPORTS)
@pytest.mark.parametrize("name", ["llama 3.1", "qwen3", "olmo2"])
def test_architectures_round_trip(family, name, tmp_path):
    encoded, exported = shipped(language_model(name), sw.target(family), tmp_path / "out", EXPORTS[family])
    certificate = sw.verify(exported.path, language_model(name), (tokens(),), encoded)
    assert certificate.passed
    assert certificate.exact


@pytest.mark.parametrize("family", EXPORTS)
def test_encoder_round_trips(family, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    model = BertForMaskedLM(BertConfig(num_hidden_layers=1, **sizes)).eval()
    encoded, exported = shipped(model, sw.target(family), tmp_path / "out", EXPORTS[family])
    assert sw.verify(exported.path, model, (tokens(),), encoded).passed


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("compressed-tensors", sw.target("compressed-tensors", compute="bf16")),
        ("compressed-tensors", sw.target("compressed-tensors:int8", block="channel", compute="fp16")),
        ("torchao", sw.target("torchao", compute="bf16")),
    ],
    ids=str,
)
def test_a_grid_computed_in_half_precision_is_run_in_it(family, grid, tmp_path):
    model = language_model("llama")
    encoded, exported = shipped(model, grid, tmp_path / "out", EXPORTS[family])
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.values_equal
    assert certificate.passed
    assert not certificate.exact
    assert certificate.remainder == 0
    assert json.loads((exported.path / "config.json").read_text())["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[grid.compute]


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("compressed-tensors", sw.int4()),
        ("compressed-tensors", sw.intn(6, levels="full", scale_dtype="fp16", block="channel")),
        ("compressed-tensors", sw.ternary()),
        ("compressed-tensors", sw.fp8(block=None)),
        ("torchao", sw.int4(levels="affine")),
        ("torchao", sw.ternary(scale_dtype="bf16")),
        ("torchao", sw.int8(block="channel", levels="full")),
    ],
    ids=str,
)
def test_other_grids_that_fit_round_trip(family, grid, tmp_path):
    """Also signed scales, code -128, and three of the four codes of two bits."""
    model = language_model("llama")
    if not any(row.holds(grid) for row in sw.targets() if row.name.startswith(family)):
        with pytest.raises(ValueError, match=r"q_proj.weight', which cannot be exported.*Targets that hold"):
            shipped(model, grid, tmp_path / "out", EXPORTS[family])
        return
    encoded, exported = shipped(model, grid, tmp_path / "out", EXPORTS[family])
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    assert certificate.codes_equal
    assert certificate.exact


@pytest.mark.parametrize("family", EXPORTS)
def test_mixed_grids_and_weights_left_out(family, tmp_path):
    model = language_model("llama")
    grids = {"*down_proj*": sw.target(f"{family}:int8", block="channel"), "lm_head": None, "*": sw.target(family)}
    encoded, exported = shipped(model, grids, tmp_path / "out", EXPORTS[family])
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    assert "lm_head.weight" not in exported.products
    assert {layer.grid.partition(" ")[0] for layer in certificate.layers if layer.nodes} == {"int8", "int4"}


@pytest.mark.parametrize("family", EXPORTS)
def test_weights_of_other_modules_are_values_with_a_reason(family, tmp_path):
    model, grid = language_model("llama"), sw.target(family)
    encoded = sw.ptq.rtn(copy.deepcopy(model), {"model.embed_tokens.weight": grid, "*": grid})
    exported = EXPORTS[family](model, encoded, tmp_path / "out")
    assert exported.floats == {"model.embed_tokens.weight": "weight of Embedding: only those of plain Linear layers are held in codes"}
    certificate = sw.verify(exported.path, model, (tokens(),), encoded)
    assert certificate.passed
    layer = next(layer for layer in certificate.layers if layer.name == "model.embed_tokens.weight")
    assert (layer.nodes, layer.grid, layer.values_equal) == (0, "float", True)


@pytest.mark.parametrize("family", EXPORTS)
def test_several_files_hold_what_one_does(family, tmp_path, monkeypatch):
    model = language_model("llama")
    encoded, _ = shipped(model, sw.target(family), tmp_path / "one", EXPORTS[family])
    monkeypatch.setattr(hf_folder, "SHARD", 20_000)
    EXPORTS[family](model, encoded, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    merged = {name: tensor for file in files for name, tensor in load_file(tmp_path / "two" / file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert sw.verify(tmp_path / "two", model, (tokens(),), encoded).passed


def test_compressed_tensors_own_quantizer_gives_the_same_bytes(tmp_path):
    """Weights on the grid with their scales, put through the library's compressor: the tensors that we write, from its code."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    for name in ("int4", "int3", "int8", "fp8"):
        encoded = sw.target(f"compressed-tensors:{name}").encode(weight)
        compressor = BaseCompressor.get_value_from_registry(schemes.form(encoded.quantizer))
        scheme = QuantizationScheme(targets=["Linear"], weights=schemes.arguments(encoded.quantizer))
        theirs = compressor.compress({"weight": encoded.decode(), "weight_scale": encoded.scales}, scheme)
        ours = schemes.tensors(encoded)
        assert theirs.keys() == ours.keys()
        for key in ours.keys() - {"weight_scale"}:
            one, two = ours[key], theirs[key]
            assert one.dtype == two.dtype
            assert torch.equal(
                one.view(torch.uint8) if one.dtype == torch.float8_e4m3fn else one,
                two.view(torch.uint8) if two.dtype == torch.float8_e4m3fn else two,
            )


def test_reciprocal_scale_of_nvfp4_decodes_to_the_same_bfloat16():
    """The format divides by a float32 where training multiplies: 0 of 5 million values differed after the rounding to bfloat16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(schemes.NVFP4)
    for seed in range(3):
        encoded = sw.target("compressed-tensors:nvfp4").encode(torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) / 30)
        scheme = QuantizationScheme(targets=["Linear"], weights=schemes.arguments(encoded.quantizer))
        assert torch.equal(compressor.decompress(schemes.tensors(encoded), scheme)["weight"].float(), encoded.decode())
    zeros = sw.target("compressed-tensors:nvfp4").encode(torch.zeros(4, 32))
    assert not compressor.decompress(schemes.tensors(zeros), scheme)["weight"].any()


def change(folder, target, name, edit):
    """Copy a folder with one tensor edited."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, metadata)
    return target


@pytest.mark.parametrize("family", EXPORTS)
def test_tampering_is_found(family, tmp_path):
    model = language_model("llama")
    encoded, exported = shipped(model, sw.target(family), tmp_path / "out", EXPORTS[family])
    module = "model.layers.1.mlp.up_proj"
    names = {
        "compressed-tensors": (f"{module}.weight_packed", f"{module}.weight_scale"),
        "torchao": (f"{module}._weight_qdata", f"{module}._weight_scale"),
    }[family]

    def flip(tensor):
        tensor.view(-1)[5] ^= 1

    def double(tensor):
        tensor.view(-1)[7] *= 2

    for place, (name, edit, told) in enumerate((
        (names[0], flip, ("codes_equal", "1 of 8192 codes differ; 1 of 8192 values differ")),
        (names[1], double, ("scales_equal", "1 of 256 scales differ; 32 of 8192 values differ")),
        ("model.norm.weight", double, ("values_equal", "model.norm.weight differs")),
    )):  # fmt: skip
        certificate = sw.verify(change(exported.path, tmp_path / str(place), name, edit), model, (tokens(),), encoded)
        assert not certificate.passed
        assert getattr(certificate, told[0]) is False
        notes = [layer.note for layer in certificate.layers if layer.note]
        assert len(notes) == 1
        assert notes[0].split(" values")[0].split(";")[0] == told[1].split(";")[0]


@pytest.mark.parametrize("family", EXPORTS)
def test_without_encoded_the_model_itself_is_compared(family, tmp_path):
    model = language_model("llama")
    encoded, exported = shipped(model, sw.target(family), tmp_path / "out", EXPORTS[family])
    assert not sw.verify(exported.path, model, (tokens(),)).passed
    twin = copy.deepcopy(model)
    sw.ptq.rtn(twin, sw.target(family))
    certificate = sw.verify(exported.path, twin, (tokens(),))
    assert (certificate.passed, certificate.codes_equal, certificate.values_equal) == (True, None, True)
    fewer = sw.verify(exported.path, twin, (tokens(),), dict(list(encoded.items())[1:]))
    assert [layer.note for layer in fewer.layers if layer.note] == ["in the folder, but not in `encoded`"]
    assert not fewer.passed


@pytest.mark.parametrize("family", EXPORTS)
def test_weights_may_come_from_elsewhere_one_at_a_time(family, tmp_path):
    model = language_model("llama")
    encoded, exported = shipped(model, sw.target(family), tmp_path / "out", EXPORTS[family])
    empty = copy.deepcopy(model).to("meta")
    EXPORTS[family](empty, encoded, tmp_path / "meta", weights=dict(model.named_parameters()))
    one, two = (load_file(path / "model.safetensors") for path in (exported.path, tmp_path / "meta"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sw.verify(tmp_path / "meta", model, (tokens(),), encoded).passed
    with pytest.raises(ValueError, match=r"`weights` must hold 'model.embed_tokens.weight'"):
        EXPORTS[family](empty, encoded, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "out"]


@pytest.mark.parametrize("family", EXPORTS)
def test_what_cannot_be_shipped_is_refused_and_nothing_is_written(family, tmp_path):
    model, export, out = language_model("llama"), EXPORTS[family], tmp_path / "out"
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj.weight', which cannot be exported.*Targets that hold int4/mid"):
        export(model, sw.ptq.rtn(twin, sw.intn(4, levels="mid")), out)
    encoded = sw.ptq.rtn(twin, sw.target(family))
    other = nn.Sequential(nn.Linear(32, 4))
    other_encoded = sw.ptq.rtn(other, sw.target(family))
    with pytest.raises(ValueError, match="`encoded` must hold at least one weight"):
        export(model, {}, out)
    with pytest.raises(ValueError, match=f"`model` must be a transformers model for {family}.*got Sequential.*onnx:matmulnbits"):
        export(other, other_encoded, out)
    two = {**encoded, "lm_head.weight": sw.target(family, compute="bf16").encode(model.lm_head.weight)}
    with pytest.raises(ValueError, match=r"`encoded` must be computed in one dtype.*\['None', 'bf16'\]"):
        export(model, two, out)
    rounding = sw.quantize_activations(twin)
    with pytest.raises(ValueError, match=f"`model` rounds the activations into 15 modules, which {family} does not hold"):
        export(twin, encoded, out)
    rounding.remove()
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"`model.norm.weight` must be finite"):
        export(broken, encoded, out)
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(model, encoded, tmp_path / "none" / "out")
    with pytest.raises(ValueError, match=r"`tokenizer`.*holds none of"):
        export(model, encoded, out, tokenizer=tmp_path)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds files that no export of this kind wrote"):
        export(model, encoded, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        export(model, encoded, out / "mine.txt")


@pytest.mark.parametrize("family", EXPORTS)
def test_an_earlier_export_is_replaced_whole_or_not_at_all(family, tmp_path, monkeypatch):
    model, out = language_model("llama"), tmp_path / "out"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    encoded, _ = shipped(model, sw.target(f"{family}:int8"), out, EXPORTS[family], tokenizer=tmp_path / "tokenizer")
    assert (out / "tokenizer.json").read_text() == "{}"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls = []

    def full(*arguments, **options):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf_folder, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            EXPORTS[family](model, encoded, out)
    assert calls
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shipped(model, sw.target(family), out, EXPORTS[family])
    assert not (out / "tokenizer.json").exists()
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]


@pytest.mark.parametrize("family", EXPORTS)
def test_config_is_what_the_library_s_own_classes_accept(family, tmp_path):
    """vLLM parses compressed-tensors' config with the same classes; and no pickle lies in the folder."""
    model = language_model("llama")
    _, exported = shipped(model, sw.target(family), tmp_path / "out", EXPORTS[family])
    told = json.loads((exported.path / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == family
    assert {path.suffix for path in exported.path.iterdir()} == {".json", ".safetensors"}
    if family == "compressed-tensors":
        from compressed_tensors.quantization import QuantizationConfig

        parsed = QuantizationConfig.model_validate({key: value for key, value in told.items() if key != "version"})
        group = parsed.config_groups["group_0"]
        assert (parsed.format, group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == ("pack-quantized", 4, 32, True)
        assert group.targets == ["Linear"]
        assert parsed.ignore == []


def test_folders_that_are_no_artifact_are_refused(tmp_path, monkeypatch):
    model, example = language_model("llama"), (tokens(),)
    for content, said in (
        (None, "has no config.json"),
        ("{", "no readable `quantization_config`"),
        ("{}", "no readable `quantization_config`"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "names 'gptq'"),
        ('{"quantization_config": {"quant_method": ["torchao"]}}', r"names \['torchao'\]"),
        ('{"quantization_config": {"quant_method": "torchao"}}', "transformers does not load"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"`path`.*{said}"):
            sw.verify(tmp_path, model, example)
    encoded, exported = shipped(model, sw.target("torchao"), tmp_path / "out", torchao)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModuleNotFoundError, match=r'torchao.*pip install "stepwell\[export\]"'):
        sw.verify(exported.path, model, example, encoded)
    with pytest.raises(ModuleNotFoundError, match="torchao"):
        torchao(model, encoded, tmp_path / "new")
