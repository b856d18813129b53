"""Files hold what was encoded, at the size that bits promise, and anything else in them is one clear error."""

import json
import os
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases import Q4_1, QUANTIZERS, gaussian

from stepwell import storage
from stepwell.presets import fp8, int4, intn, mxfp4, nvfp4
from stepwell.quantizers import Encoded


def same(one: Encoded, two: Encoded) -> bool:
    """Say whether two encoded weights are equal to the last bit, dtypes included."""
    if one.quantizer != two.quantizer:
        return False
    pairs = [(getattr(one, part), getattr(two, part)) for part in ("codes", "scales", "tensor_scale", "zero_points")]
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_what_was_encoded_comes_back(quantizer, dtype, tmp_path):
    weight = gaussian(8, 64, seed=0, dtype=dtype)
    weight[1] = 0
    encoded = quantizer.encode(weight)
    storage.save(encoded, tmp_path / "one.safetensors")
    found = storage.load(tmp_path / "one.safetensors")
    assert same(found, encoded)
    assert torch.equal(found.decode(), encoded.decode())


def test_a_mapping_comes_back_as_a_mapping_and_one_weight_as_one(tmp_path):
    weight = gaussian(8, 64, seed=1)
    several = {"a.weight": int4().encode(weight), "a": nvfp4().encode(weight), "b": intn(3, axis=0).encode(weight.t().contiguous())}
    storage.save(several, str(tmp_path / "several"))
    found = storage.load(str(tmp_path / "several"))
    assert list(found) == list(several)
    assert all(same(found[name], encoded) for name, encoded in several.items())
    storage.save({"weight": several["a"]}, tmp_path / "named")
    assert list(storage.load(tmp_path / "named")) == ["weight"]
    storage.save(several["a"], tmp_path / "named")
    assert isinstance(storage.load(tmp_path / "named"), Encoded)


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (int4(), 4 + 32 / 32),
        (intn(3, block=64, scale_dtype="fp16"), 3 + 16 / 64),
        (mxfp4(), 4 + 8 / 32),
        (nvfp4(), 4 + 8 / 16),
        (fp8(block=128), 8 + 32 / 128),
        (Q4_1, 4 + 32 / 32),
        (intn(2, levels="affine", scale_dtype="bf16"), 2 + (16 + 8) / 32),
    ],
    ids=str,
)
def test_files_have_the_size_that_bits_promise(quantizer, bits, tmp_path):
    storage.save(quantizer.encode(gaussian(256, 1024, seed=2)), tmp_path / "one")
    header = 2048  # names, shapes and the description
    assert 0 <= (tmp_path / "one").stat().st_size - 256 * 1024 * bits / 8 <= header


def test_the_header_can_be_read_without_the_tensors(tmp_path):
    storage.save({"layer": int4().encode(gaussian(8, 64, seed=3))}, tmp_path / "one")
    entry = storage.read_header(tmp_path / "one")["weights"]["layer"]
    assert (entry["shape"], entry["format"], entry["block"], entry["scale_dtype"]) == ([8, 64], "int4", 32, "fp32")


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    old = int4().encode(gaussian(8, 64, seed=4))
    storage.save(old, tmp_path / "one")

    def full(tensors, path, metadata):
        path.write_bytes(b"half of a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        storage.save(int4().encode(gaussian(8, 64, seed=5)), tmp_path / "one")
    assert same(storage.load(tmp_path / "one"), old)
    assert os.listdir(tmp_path) == ["one"]


def test_who_reads_the_old_file_while_a_new_one_is_saved_reads_it_whole(tmp_path):
    storage.save(int4().encode(gaussian(8, 64, seed=4)), tmp_path / "one")
    before = (tmp_path / "one").read_bytes()
    with open(tmp_path / "one", "rb") as reader:
        storage.save(int4().encode(gaussian(8, 64, seed=5)), tmp_path / "one")
        assert reader.read() == before != (tmp_path / "one").read_bytes()


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    storage.save(int4().encode(gaussian(8, 64, seed=6)), tmp_path / "one")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_cannot_be_saved_is_refused_by_value(tmp_path):
    encoded = int4().encode(gaussian(8, 64, seed=7))
    with pytest.raises(ValueError, match=r"`encoded`.*empty mapping"):
        storage.save({}, tmp_path / "one")
    with pytest.raises(TypeError, match=r"`encoded`.*Tensor for 'w'"):
        storage.save({"w": encoded.codes}, tmp_path / "one")
    with pytest.raises(TypeError, match=r"`encoded`.*list"):
        storage.save([encoded], tmp_path / "one")
    with pytest.raises(FileNotFoundError, match=r"`path`.*nowhere"):
        storage.save(encoded, tmp_path / "nowhere" / "one")
    with pytest.raises(IsADirectoryError, match=r"`path` must be a file: got the folder .*weights\.safetensors"):
        storage.save(encoded, tmp_path)
    assert os.listdir(tmp_path) == []


def test_missing_files_and_other_formats_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path`.*absent"):
        storage.load(tmp_path / "absent")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"weight": [1, 2, 3]}))
    torch.save({"weight": torch.ones(3)}, tmp_path / "torch")
    (tmp_path / "empty").touch()
    for name in ("pickle", "torch", "empty"):
        with pytest.raises(ValueError, match=f"`path`.*{name}"):
            storage.load(tmp_path / name)
    save_file({"weight": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"`path`.*`stepwell.save` did not write it"):
        storage.load(tmp_path / "plain")


def rewritten(path, change=None, tensors=None):
    """Write a file again with its description changed in place by `change`, or with other tensors."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        description = json.loads(json.loads(file.read(length))["__metadata__"]["stepwell"])
    if change is not None:
        change(description)
    save_file({**load_file(path), **(tensors or {})}, path, {"stepwell": json.dumps(description)})


def entry(**fields):
    return lambda description: description["weights"]["weight"].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        entry(shape=[8, 65]),
        entry(shape=[8, 128]),
        entry(shape=[4, 64]),
        entry(shape=[-8, -64]),
        entry(shape=[8, 64.0]),
        entry(shape=[2**62, 64]),
        entry(shape="8,64"),
        entry(shape=None),
        entry(shape=[]),
        entry(dtype="torch.float64"),
        entry(dtype="torch.int8"),
        entry(dtype=[]),
        entry(format="int5"),
        entry(format="int4/affine"),
        entry(format="int99"),
        entry(format="e8m0"),
        entry(format=None),
        entry(format=["int4"]),
        entry(block=0),
        entry(block=16),
        entry(block="channel"),
        entry(block=3),
        entry(block=True),
        entry(rule="best"),
        entry(rule=float("nan")),
        entry(scale_dtype="fp16"),
        entry(scale_dtype="e4m3", scale_rounding="up"),
        entry(scale_dtype="e8m0"),
        entry(scale_rounding="up"),
        entry(zero="minimum"),
        entry(axis=2),
        entry(axis="0"),
        entry(compute="fp8"),
        entry(extra=1),
        lambda description: description["weights"]["weight"].pop("block") and description["weights"]["weight"].pop("shape"),
        lambda description: description["weights"].update(weight=[1, 2]),
        lambda description: description["weights"].update(other=description["weights"]["weight"]),
        lambda description: description.update(weights={}),
        lambda description: description.update(weights=[]),
        lambda description: description.pop("weights"),
        lambda description: description.pop("version"),
        lambda description: description.update(version=2),
        lambda description: description.update(version=None),
        lambda description: description["weights"].update(other=description["weights"].pop("weight")),
    ],
)
def test_descriptions_that_do_not_hold_together_are_one_value_error(change, tmp_path):
    storage.save(int4().encode(gaussian(8, 64, seed=8)), tmp_path / "one")
    rewritten(tmp_path / "one", change)
    with pytest.raises(ValueError, match=r"`path`.*one"):
        storage.load(tmp_path / "one")


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"x"', "{}", "[" * 100_000, '{"version": 1, "weights": 3}'])
def test_descriptions_that_are_no_description_are_one_value_error(text, tmp_path):
    save_file({"weight.codes": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "one", {"stepwell": text})
    for read in (storage.load, storage.read_header):
        with pytest.raises(ValueError, match=r"`path`.*one"):
            read(tmp_path / "one")


@pytest.mark.parametrize(
    ("quantizer", "name", "tensor"),
    [
        (int4(), "codes", torch.zeros(8 * 64 // 2, dtype=torch.int8)),
        (int4(), "codes", torch.full((8 * 64 // 2,), 0x88, dtype=torch.uint8)),  # -8 is no code of symmetric int4
        (int4(), "codes", torch.zeros(8, dtype=torch.uint8)),
        (int4(), "scales", torch.full((8, 2), torch.nan)),
        (int4(), "scales", torch.full((8, 2), torch.inf)),
        (int4(), "scales", torch.ones(2, 8)),
        (int4(), "scales", torch.ones(8, 2, dtype=torch.float16)),
        (int4(), "more", torch.ones(1)),
        (fp8(block=32), "codes", torch.full((8 * 64,), 0x7F, dtype=torch.uint8)),
        (mxfp4(), "scales", torch.full((8, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
        (nvfp4(), "tensor_scale", torch.tensor(torch.nan)),
        (nvfp4(), "tensor_scale", torch.ones(2)),
        (intn(4, levels="affine"), "zero_points", torch.full((8, 2), 16, dtype=torch.uint8)),
        (intn(4, levels="affine"), "zero_points", torch.ones(8, 2)),
        (Q4_1, "zero_points", torch.full((8, 2), torch.nan, dtype=torch.float16)),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value),
)
def test_tensors_that_do_not_fit_the_description_are_one_value_error(quantizer, name, tensor, tmp_path):
    storage.save(quantizer.encode(gaussian(8, 64, seed=9)), tmp_path / "one")
    rewritten(tmp_path / "one", tensors={f"weight.{name}": tensor})
    with pytest.raises(ValueError, match=r"`path`.*one.*weight"):
        storage.load(tmp_path / "one")


@pytest.mark.parametrize("quantizer", [int4(), nvfp4(), mxfp4(), Q4_1, intn(4, levels="affine"), fp8(block=32)], ids=str)
def test_damaged_files_load_as_something_sound_or_are_one_value_error(quantizer, tmp_path):
    path, chance = tmp_path / "one", random.Random(0)
    storage.save(quantizer.encode(gaussian(4, 64, seed=11)), path)
    whole, refused = path.read_bytes(), 0
    for trial in range(120):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        elif trial % 4 == 1:
            start = chance.randrange(len(damaged))
            damaged[start : start + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))
        else:
            for _ in range(chance.randrange(1, 6)):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = storage.load(path)
        except ValueError as error:
            refused += 1
            assert "`path`" in str(error)  # noqa: PT017 - both outcomes are legal, and most flipped bits are in the header
        else:
            weights = found.values() if isinstance(found, dict) else [found]
            assert all(bool(weight.scales.isfinite().all()) and weight.decode().shape == weight.codes.shape for weight in weights)
    assert refused > 60
