"""Malformed, truncated and lying files: each is read, and then rightly, or refused in one line that names it, soon and in little memory."""

import random
import resource
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from tests.cases import Q4_1, gaussian
from tests.ship import mutations

import stepwell as sw
from stepwell.export import gguf_file, onnx_file
from stepwell.ship.checkpoint import SINGLE, open_checkpoint
from stepwell.ship.contents import contents

SECONDS, MEMORY = 2.0, 1 << 29  # that one file may take at most
NORMAL, ALL = 120, 700  # files of every kind: in the suite, and in the slow one


def plain(path):
    save_file(
        {"a.weight": gaussian(6, 8, seed=0), "b.weight": gaussian(3, 9, seed=1).reshape(3, 3, 3).bfloat16(), "c": torch.tensor(3)}, path
    )


def encoded(path):
    grids = (sw.int4(block=16), sw.nvfp4(), Q4_1, sw.intn(2, block=16, levels="affine"), sw.fp8(), sw.ternary(block=16))
    sw.save({f"w{k}": grid.encode(gaussian(4, 32, seed=k)) for k, grid in enumerate(grids)}, path)


def gguf(path):
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_rope_scaling_finetuned(False)
    writer.add_token_list([f"token{k}" for k in range(8)])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("half", 0.5)
    for k, kind in enumerate((GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0)):
        writer.add_tensor(f"blk.{k}.weight", quantize(gaussian(4, 64, seed=k).numpy(), kind), raw_dtype=kind)
    writer.add_tensor("norm.weight", gaussian(1, 64, seed=2)[0].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def products(path):
    """Write a MatMulNBits node with zero points and a DequantizeLinear node with blocks."""
    tensors = [
        helper.make_tensor("codes", TensorProto.UINT8, [4, 2, 16], bytes(range(128)), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [8], np.ones(8, np.float32).tobytes(), raw=True),
        helper.make_tensor("zeros", TensorProto.UINT8, [4], bytes(4), raw=True),
        helper.make_tensor("q", TensorProto.INT4, [4, 32], bytes(64), raw=True),
        helper.make_tensor("qs", TensorProto.FLOAT, [4, 2], np.ones(8, np.float32).tobytes(), raw=True),
    ]
    sizes = {"K": 64, "N": 4, "bits": 4, "block_size": 32}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "codes", "scales", "zeros"], ["h"], domain="com.microsoft", name="a#1", **sizes),
        helper.make_node("DequantizeLinear", ["q", "qs"], ["w"], name="b#1", axis=1, block_size=16),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 64), ("y", 32))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)), str(path))


def read_checkpoint(path):
    """Read every tensor; what safetensors' own loader makes of the file must be the same."""
    found = open_checkpoint(path.parent)
    own = load_file(path)
    assert set(found.tensors) == set(own)
    for name, tensor in own.items():
        assert torch.equal(found.read(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def read_encoded(path):
    """Load and decode: whatever came through describes itself rightly."""
    found = sw.load(path)
    for one in [found] if isinstance(found, sw.Encoded) else found.values():
        assert one.decode().shape == one.codes.shape


def read_gguf(path):
    for one in gguf_file.read(path).tensors.values():
        assert gguf_file.values(one).shape == one.shape


def read_onnx(path):
    for one in onnx_file.read(path).products:
        assert one.held.decode().shape == one.held.codes.shape


KINDS = {
    "checkpoint": (SINGLE, plain, mutations.safetensors, read_checkpoint),
    "encoded": ("one.safetensors", encoded, mutations.safetensors, read_encoded),
    "gguf": ("one.gguf", gguf, mutations.gguf, read_gguf),
    "onnx": ("one.onnx", products, mutations.onnx_file, read_onnx),
}


def outcome(read, path):
    """Say what a reader made of a file: None, or its one line; anything else than a ValueError comes through."""
    began = time.perf_counter()
    try:
        with np.errstate(all="ignore"):  # scales may be anything
            read(path)
        said = None
    except ValueError as error:
        said = str(error)
        assert path.name in said or str(path.parent) in said, said
        assert "\n" not in said
        assert "llocate" not in said, said
    assert time.perf_counter() - began < SECONDS
    return said


@pytest.fixture
def little_memory():
    """Let this process grow by no more than MEMORY."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def fuzzed(tmp_path, kind, count, seed):
    """Return how many of the mutated files were refused and how many were read, by the reader and by `inspect`."""
    name, make, mutate, read = KINDS[kind]
    path, draw = tmp_path / name, random.Random(seed)
    make(path)
    read(path)
    contents(path)
    good, refused = path.read_bytes(), 0
    for _ in range(count):
        path.write_bytes(mutate(good, draw))
        refused += outcome(read, path) is not None
        outcome(contents, path)
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_lying_file_is_read_rightly_or_refused_in_one_line(tmp_path, kind, little_memory):
    refused = fuzzed(tmp_path, kind, NORMAL, seed=0)
    assert NORMAL // 4 < refused <= NORMAL


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_lying_files(tmp_path, kind, little_memory):
    assert ALL // 4 < fuzzed(tmp_path, kind, ALL, seed=1) <= ALL
