"""Checkpoints: what is in the files comes back tensor by tensor, and whatever does not hold together is one line that names the file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stepwell.ship.checkpoint import INDEX, LARGEST_JSON, SINGLE, open_checkpoint, read_json, refuse_pickle

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def sharded(folder, mapping=None, files=("one.safetensors", "two.safetensors")):
    """Write the tensors into two shards, the first of them alone in the first, with an index that may lie."""
    names = list(TENSORS)
    save_file({names[0]: TENSORS[names[0]]}, folder / files[0])
    save_file({name: TENSORS[name] for name in names[1:]}, folder / files[1])
    true = {names[0]: files[0], **dict.fromkeys(names[1:], files[1])}
    (folder / INDEX).write_text(json.dumps({"weight_map": true if mapping is None else mapping}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_every_tensor_comes_back_in_its_own_dtype(tmp_path, shards):
    if shards == 1:
        save_file(TENSORS, tmp_path / SINGLE)
    else:
        sharded(tmp_path)
    found = open_checkpoint(tmp_path)
    assert {name: one.shape for name, one in found.tensors.items()} == {name: tuple(value.shape) for name, value in TENSORS.items()}
    assert found.elements == 11
    for name, value in TENSORS.items():
        assert found.read(name).dtype == value.dtype
        assert torch.equal(found.read(name), value)


def test_a_lone_file_of_another_name_is_taken_and_two_are_not(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert len(open_checkpoint(tmp_path).tensors) == 3
    save_file(TENSORS, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 safetensors and neither"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "..\\one.safetensors", "one.bin", ".."]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "one.safetensors")  # where the traversal would lead
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(ValueError, match=r"only safetensors beside it are read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "no readable JSON"),
        ("[" * 100_000, "no readable JSON"),
        ("[]", "must hold a JSON object: got list"),
        ("{}", "no `weight_map`"),
        ('{"weight_map": {}}', "no `weight_map`"),
        ('{"weight_map": {"a": 3}}', "no `weight_map`"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names 'gone.safetensors', which is not in"),
        ('{"weight_map": {"a.weight": "one.safetensors", "x": "one.safetensors"}}', "lacks 1 tensors that .* promises, such as 'x'"),
        (b"\xff\xfe{", "no readable JSON"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, index, words):
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(index if isinstance(index, bytes) else index.encode())
    with pytest.raises(ValueError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert INDEX in str(caught.value)


def test_the_index_says_which_of_two_tensors_counts(tmp_path):
    sharded(tmp_path)
    save_file({"a.weight": torch.zeros(2, 3), **{name: TENSORS[name] for name in ("b.weight", "c")}}, tmp_path / "two.safetensors")
    assert torch.equal(open_checkpoint(tmp_path).read("a.weight"), TENSORS["a.weight"])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b.weight": "two.safetensors", "c": "two.safetensors"}}))
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"b.weight": "two.safetensors", "c": "two.safetensors", "d": "one.safetensors"}})
    )
    save_file({"a.weight": torch.ones(2, 3), "d": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"'a.weight' is in two.safetensors and one.safetensors"):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_by_name_and_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"no safetensors, only pytorch_model.bin: pickles can run code and are never read"):
        open_checkpoint(tmp_path)
    for name in ("model.pt", "model.CKPT", "pytorch_model.bin", "x.pth", "x.pkl"):
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            refuse_pickle(tmp_path / name)
    refuse_pickle(tmp_path / "model.safetensors")


def test_nothing_and_nowhere_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(ValueError, match="has no safetensors"):
        open_checkpoint(tmp_path)
    save_file({}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="holds no tensor"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        read_json(tmp_path / "config.json")


def test_a_huge_index_is_not_read(tmp_path):
    sharded(tmp_path)
    with (tmp_path / INDEX).open("r+b") as file:
        file.truncate(LARGEST_JSON + 1)  # a hole: no byte of it is written
    with pytest.raises(ValueError, match="more than any such file needs"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    found = open_checkpoint(tmp_path)
    save_file({"a.weight": torch.zeros(3, 3)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="has changed while it was read"):
        found.read("a.weight")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        found.read("b.weight")
