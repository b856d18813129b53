"""Streamed artifacts: the same as those of a model in memory, file for file, without the model in memory."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ship.models import copied, llama

import stepwell as sw
from stepwell.ship.artifact import draft
from stepwell.ship.checkpoint import INDEX, SINGLE, open_checkpoint
from stepwell.ship.quantize import Order, quantize
from stepwell.ship.source import open_source
from stepwell.ship.stream import stream

pytest.importorskip("transformers")
TARGETS = ["safetensors", "gguf:q4_0", "compressed-tensors:int4"]


def silent(words, done, total):
    del words, done, total


def streamed(folder, out, **options):
    with stream(open_checkpoint(folder), Order(**{"method": "rtn", **options}), out, progress=silent) as shipped:
        return shipped


def in_memory(folder, out, **options):
    source = open_source(str(folder), None, limit=2, window=None)
    with quantize(source, Order(**{"method": "rtn", **options}), out, progress=silent) as shipped:
        return shipped


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A Llama in bfloat16 and several files, its head tied."""
    path = tmp_path_factory.mktemp("models") / "sharded"
    path.mkdir()
    llama(path, tied=True, dtype=torch.bfloat16, shard="40KB")
    assert (path / INDEX).is_file()
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_streamed_is_what_a_model_in_memory_gives(sharded, tmp_path, target):
    one, two = streamed(sharded, tmp_path / "one", target=target), in_memory(sharded, tmp_path / "two", target=target)
    assert one.certificate.passed
    assert two.certificate.passed
    assert [row.sha256 for row in one.weights] == [row.sha256 for row in two.weights]
    assert (one.floats, one.elements, one.total, one.bits) == (two.floats, two.elements, two.total, two.bits)
    assert [row.error for row in one.weights] == pytest.approx([row.error for row in two.weights], rel=1e-5)
    assert set(one.files) == set(two.files)
    if target == "gguf:q4_0":
        assert one.files["model.gguf"] == two.files["model.gguf"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_streamed_artifact_runs_as_the_rounded_model_does(sharded, tmp_path, target):
    shipped = streamed(sharded, tmp_path / "one", target=target)
    source = open_source(str(sharded), None, limit=2, window=None)
    encoded = sw.ptq.rtn(source.model, {row.name: sw.target(target) for row in shipped.weights} | {"*": None})
    source.model.config.use_cache = False
    checked = sw.verify(tmp_path / "one" / shipped.file, source.model, source.example, encoded)
    # norms stay bfloat16 in files that keep a tensor's own dtype, which holds them exactly
    assert (checked.codes_equal, checked.scales_equal, checked.values_equal) == (True, True, True)
    assert checked.max_relative_error <= checked.tolerance


def test_searched_scales_are_streamed_too(folder, tmp_path):
    plain, searched = (streamed(folder, tmp_path / way, target="safetensors", bits=2, method=way) for way in ("rtn", "search"))
    assert all(one.error < other.error for one, other in zip(searched.weights, plain.weights, strict=True))


def test_no_more_than_a_layer_is_asked_for_at_a_time(folder, tmp_path, monkeypatch):
    """Every tensor is read on its own; none is held when the next one comes."""
    import weakref

    from stepwell.ship.checkpoint import Checkpoint

    alive, most = [], []
    honest = Checkpoint.read

    def read(self, name):
        most.append(sum(one() is not None for one in alive))
        tensor = honest(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    streamed(folder, tmp_path / "out", target="safetensors")
    assert len(most) > 20
    assert max(most) <= 1


def test_what_does_not_fill_the_model_is_named(folder, tmp_path):
    def refused(change, words):
        copy = copied(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        tensors = load_file(copy / SINGLE)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, copy / SINGLE)
        with pytest.raises(ValueError, match=words):
            streamed(copy, tmp_path / "out", target="safetensors")
        assert not (tmp_path / "out").exists()

    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors, name=name):
        tensors[name][3, 2] = float("inf")

    refused(lambda tensors: tensors.pop(name), rf"lacks 1 tensors that LlamaForCausalLM has, such as '{name}'")
    refused(lambda tensors: tensors.update({name: torch.ones(96, 32)}), r"of shape \(96, 32\), the model's is \(96, 64\)")
    refused(spoil, rf"`{name}` must be finite: got 1 of")
    refused(lambda tensors: spoil(tensors, "model.embed_tokens.weight"), r"`model.embed_tokens.weight` must be finite")


def test_what_has_no_place_in_the_model_is_left_out_and_said(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy")
    save_file(load_file(copy / SINGLE) | {"extra.weight": torch.ones(2)}, copy / SINGLE)
    assert "1 tensors of the checkpoint have no place in the model" in streamed(copy, tmp_path / "out", target="gguf:q4_0").notes[0]


def test_what_is_read_again_is_what_decides(folder, tmp_path, monkeypatch):
    """A writer that spoils one weight is found out."""
    from stepwell.ship import targets, tensor_file

    honest = tensor_file.write_encoded

    def lying(path, weights, *, names):
        def spoiled():
            for place, (name, one) in enumerate(weights):
                yield name, one._replace(codes=-one.codes.clamp(-7, 7)) if place == 3 else one

        honest(path, spoiled(), names=names)

    monkeypatch.setattr(targets, "write_encoded", lying)
    shipped = streamed(folder, tmp_path / "out", target="safetensors")
    assert not shipped.certificate.passed
    assert [layer.codes_equal for layer in shipped.certificate.layers].count(False) == 1


def test_a_missing_weight_is_found_when_it_is_read_again(folder, tmp_path, monkeypatch):
    from stepwell.ship import targets, tensor_file

    honest = tensor_file.write_encoded
    monkeypatch.setattr(targets, "write_encoded", lambda path, weights, *, names: honest(path, list(weights)[1:], names=names))
    shipped = streamed(folder, tmp_path / "out", target="safetensors")
    assert not shipped.certificate.passed
    assert shipped.certificate.layers[-1].note == "not in the file"


def test_the_command_streams_where_it_can(folder, tmp_path, monkeypatch, capsys):
    import sys

    from stepwell import cli
    from stepwell.ship import source

    @contextmanager
    def forbidden(*arguments, **options):
        raise AssertionError("the model was loaded")
        yield

    monkeypatch.setattr(source, "model_alone", forbidden)
    monkeypatch.setattr(
        sys, "argv", ["stepwell", "quantize", str(folder), str(tmp_path / "out"), "--target", "compressed-tensors", "--json"]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert left.value.code in (0, None)
    assert told["certificate"]["max_relative_error"] is None
    assert told["passed"]
    assert {"model/config.json", "model/tokenizer.json"} <= set(told["files"])


def test_a_draft_that_is_streamed_into_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    import errno

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stepwell.ship.tensor_file.TensorFile.add", full)
    with pytest.raises(OSError, match=r"No space left on device\. What was there before is untouched"):
        streamed(folder, tmp_path / "out", target="safetensors")
    assert list(tmp_path.iterdir()) == []
    with draft(tmp_path / "out") as path:
        (path / "x").write_text("the place is free")


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_take_the_block_type_that_was_asked_for(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "wide"
    llama(folder, hidden=256, feed=256, layers=1)
    streamed(folder, tmp_path / "out", target=f"gguf:{kind.lower()}")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert found["blk.0.ffn_up.weight"] == kind
