"""ONNX export: what is in the file, read without our reader, and what is left alone when something is wrong."""

import copy
import json
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.export.onnx import onnx as export

from .conftest import RECIPES, expected, mlp, run

NIBBLES = {0: 0, 1: 4}


def raw(path, name: str) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Return the attributes and constants of the operator written for a parameter."""
    model = onnx.load(str(path))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits" and node.name.startswith(name))
    return {a.name: a.i for a in node.attribute}, dict(zip(("codes", "scales", "zeros"), map(tensors.get, node.input[1:]), strict=False))


def code(parts: dict[str, np.ndarray], bits: int, row: int, column: int, block: int) -> int:
    """Read one unsigned code out of the packed bytes, from the operator's documentation."""
    inside = column % block
    byte = int(parts["codes"][row, column // block, inside * bits // 8])
    return byte if bits == 8 else byte >> NIBBLES[inside % 2] & 15


@pytest.mark.parametrize("name", RECIPES)
def test_runtime_computes_what_the_grid_model_computes(case, name):
    model, encoded, example, path, _ = case(name)
    reference = expected(model, encoded, *example)
    error = np.abs(run(path, *example) - reference.numpy()).max() / reference.abs().max().item()
    # the demo asks for 1e-5; sums of at most 96 float32 products in two layers stay ten times below
    assert error < 1e-6


@pytest.mark.parametrize("name", RECIPES)
def test_batch_stays_open_whatever_the_example(case, name):
    model, encoded, example, path, _ = case(name)
    shape = onnx.load(str(path)).graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param == "batch"
    for rows in (1, 2, 5):
        inputs = example[0][:1].expand(rows, *example[0].shape[1:]).contiguous()
        reference = expected(model, encoded, inputs)
        assert np.abs(run(path, inputs) - reference.numpy()).max() < 1e-6 * reference.abs().max().item()


@pytest.mark.parametrize("name", ["three dimensions", "language"])
def test_sequence_stays_open_on_request(case, name):
    model, encoded, example, path, _ = case(name)
    inputs = torch.cat([example[0], example[0][:, :3]], dim=1)
    reference = expected(model, encoded, inputs)
    assert np.abs(run(path, inputs) - reference.numpy()).max() < 1e-6 * reference.abs().max().item()
    assert not any(dim.dim_param == "sequence" for dim in onnx.load(str(case("mlp").path)).graph.input[0].type.tensor_type.shape.dim)


@pytest.mark.parametrize(
    ("name", "parameter", "bits", "block"),
    [
        ("mlp", "0.weight", 4, 32),
        ("mlp", "3.weight", 4, 32),
        ("symmetric, one row", "0.weight", 4, 16),
        ("8 bits and affine", "0.weight", 8, 64),
        ("8 bits and affine", "3.weight", 4, 32),
        ("8 bits affine, channel", "0.weight", 8, 32),
        ("8 bits affine, channel", "3.weight", 4, 32),  # one scale per 96 inputs, in three blocks
        ("tied", "first.weight", 4, 32),
    ],
)
def test_codes_scales_and_zero_points_in_the_file_are_those_encoded(case, name, parameter, bits, block):
    _, encoded, _, path, _ = case(name)
    weight = encoded[parameter]
    fields, parts = raw(path, parameter)
    rows, columns = weight.codes.shape
    assert fields == {"N": rows, "K": columns, "bits": bits, "block_size": block, "accuracy_level": 1}
    offset = 0 if weight.zero_points is not None else 2 ** (bits - 1)
    read = [[code(parts, bits, row, column, block) - offset for column in range(columns)] for row in range(rows)]
    assert torch.equal(torch.tensor(read), weight.codes.long())
    spread = weight.scales.repeat_interleave(columns // block // weight.scales.shape[1], dim=1)
    assert parts["scales"].tobytes() == spread.numpy().tobytes()
    if weight.zero_points is None:
        assert "zeros" not in parts
    else:
        blocks = columns // block
        stored = parts["zeros"].reshape(rows, -(-blocks * bits // 8))
        place = {b: (b, 0) if bits == 8 else (b // 2, NIBBLES[b % 2]) for b in range(blocks)}
        zeros = [[int(stored[row, place[b][0]]) >> place[b][1] & 2**bits - 1 for b in range(blocks)] for row in range(rows)]
        assert torch.equal(torch.tensor(zeros), weight.zero_points.long())


def test_affine_and_signed_scales_are_really_exercised(case):
    for name, parameter in (("8 bits and affine", "3.weight"), ("8 bits affine, channel", "0.weight")):
        assert case(name).encoded[parameter].zero_points.unique().numel() > 3
    assert case("mlp").encoded["0.weight"].scales.min() < 0 < case("mlp").encoded["0.weight"].scales.max()


def test_every_weight_is_replaced_or_listed_with_its_reason(case):
    assert case("mlp").exported.products == {"0.weight": 1, "3.weight": 1}
    assert case("mlp").exported.floats == {}
    assert case("tied").exported.products == {"first.weight": 3}
    assert case("Conv1D").exported.products == {"0.weight": 1, "2.weight": 1}
    language = case("language").exported
    layer = {f"layer.{name}": 1 for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")}
    assert language.products == {"embedding.weight": 1, **layer}
    assert list(language.floats) == ["embedding.weight"]
    assert "also read by Gather" in language.floats["embedding.weight"]
    convolution = case("convolution").exported
    assert convolution.products == {"5.weight": 1}
    assert set(convolution.floats) == {"0.weight", "2.weight"}
    assert all("Conv2d weight of 4 dimensions" in reason for reason in convolution.floats.values())
    assert "folded" in convolution.floats["0.weight"]
    assert "folded" not in convolution.floats["2.weight"]
    assert case("twins").exported.floats == {"idle.weight": "not used by the traced forward pass"}
    for name in RECIPES:
        made = case(name)
        assert set(made.encoded) <= {*made.exported.products, *made.exported.floats} | ({"two.weight"} if name == "twins" else set())


@pytest.mark.parametrize("name", RECIPES)
def test_no_float_copy_of_a_replaced_weight_stays_in_the_file(case, name):
    _, encoded, _, path, exported = case(name)
    stored = [tuple(tensor.dims) for tensor in onnx.load(str(path)).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    for parameter in set(exported.products) - set(exported.floats):
        shape = tuple(encoded[parameter].codes.shape)
        assert shape not in stored
        assert shape[::-1] not in stored


def test_file_describes_itself_and_keeps_no_source_paths(case):
    _, encoded, _, path, exported = case("convolution")
    properties = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert json.loads(properties["stepwell"]) == {
        "version": 1,
        "products": {"5.weight": str(encoded["5.weight"].quantizer)},
        "floats": exported.floats,
    }
    text = path.read_bytes()
    assert not any(part in text for part in (b".py", b"stack_trace", b"torch.nn.modules", str(path.parent).encode()))


def fresh(seed: int = 0) -> tuple[nn.Sequential, dict[str, sw.Encoded], tuple[torch.Tensor]]:
    torch.manual_seed(seed)
    model = mlp()
    encoded = sw.ptq.rtn(copy.deepcopy(model), sw.int4())  # the model itself keeps its float weights
    return model, encoded, (torch.randn(2, 64),)


def test_model_need_not_hold_the_grid_and_is_left_as_it_was(tmp_path):
    model, encoded, example = fresh()
    model.train()
    model[0].eval()
    before = {name: (id(parameter), parameter.detach().clone(), parameter._version) for name, parameter in model.named_parameters()}
    export(model, encoded, example, tmp_path / "m.onnx")
    assert [module.training for module in model.modules()] == [True, False, True, True, True]
    for name, parameter in model.named_parameters():
        identity, value, version = before[name]
        assert (id(parameter), parameter._version, parameter.requires_grad) == (identity, version, True)
        assert torch.equal(parameter, value)
    reference = expected(model, encoded, *example)
    assert np.abs(run(tmp_path / "m.onnx", *example) - reference.numpy()).max() < 1e-6 * reference.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_exported_in_float32(tmp_path, dtype):
    model, encoded, example = fresh()
    model = model.to(dtype)
    export(model, encoded, (example[0].to(dtype),), tmp_path / "m.onnx")
    assert model[0].weight.dtype == dtype
    x = example[0].to(dtype).float()
    reference = expected(copy.deepcopy(model).float(), encoded, x)
    assert np.abs(run(tmp_path / "m.onnx", x) - reference.numpy()).max() < 1e-6 * reference.abs().max().item()


def test_export_is_quiet(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        export(*fresh(), tmp_path / "m.onnx")
    out, err = capfd.readouterr()
    assert (out, err, [str(warning.message) for warning in heard]) == ("", "", [])


class Bounded(nn.Module):
    """Takes a mask beside its tokens' features, and has positions for at most 16 of them."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(16, 32)
        self.mix = nn.Linear(32, 32)

    def forward(self, x, mask):
        hidden = self.mix(x + self.positions.weight[: x.shape[1]])
        return (hidden * mask[..., None]).sum(1)


def test_two_inputs_and_a_longest_sequence(tmp_path):
    torch.manual_seed(0)
    model, example = Bounded(), (torch.randn(1, 6, 32), torch.rand(1, 6))
    encoded = sw.ptq.rtn(model, sw.int4())
    export(model, encoded, example, tmp_path / "m.onnx", sequence=1)
    for rows, length in ((1, 6), (4, 16), (3, 1)):
        inputs = torch.randn(rows, length, 32), torch.rand(rows, length)
        reference = expected(model, encoded, *inputs)
        assert np.abs(run(tmp_path / "m.onnx", *inputs) - reference.numpy()).max() < 1e-6 * reference.abs().max().item()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class Fixed(Branching):
    def forward(self, x):
        return self.layer(x.reshape(2, 64))


def broken(kind: str):
    """Return arguments that are wrong in one way."""
    model, encoded, example = fresh()
    if kind in ("branching", "fixed batch"):
        model = Branching() if kind == "branching" else Fixed()
        encoded = sw.ptq.rtn(model, sw.int4())
    grids = {"fp4": sw.fp4(), "int3": sw.int3(), "mid": sw.int4(levels="mid"), "short": sw.int4(block=8)}
    if kind in grids:
        encoded["3.weight"] = grids[kind].encode(model[3].weight)
    if kind == "name":
        encoded["7.weight"] = encoded.pop("3.weight")
    if kind == "shape":
        encoded["3.weight"] = encoded["0.weight"]
    if kind == "tensor":
        encoded["3.weight"] = model[3].weight
    return model, {} if kind == "empty" else encoded, example[0] if kind == "example" else example


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("fp4", ValueError, "3.weight.*int2, int4, int8.*fp4_e2m1"),
        ("int3", ValueError, "3.weight.*int2, int4, int8.*int3.*Targets that hold it: .*torchao:int3"),
        ("mid", ValueError, "3.weight.*int4/mid.*'symmetric', 'full' or 'affine'"),
        ("short", ValueError, "3.weight.*blocks of 16, 32, 64, 128, 256"),
        ("name", ValueError, "`encoded` names '7.weight'"),
        ("shape", ValueError, r"'3.weight' with shape \(96, 64\)"),
        ("tensor", TypeError, "Parameter for '3.weight'"),
        ("empty", ValueError, "`encoded` must hold at least one"),
        ("example", TypeError, "`example` must be a tuple"),
        ("branching", RuntimeError, "`model` could not be traced"),
        ("fixed batch", RuntimeError, "`model` could not be traced.*open axes batch.*constant"),
    ],
)
def test_failure_names_the_cause_and_leaves_file_and_model(tmp_path, kind, error, words):
    model, encoded, example = broken(kind)
    model.train()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the old file")
    with pytest.raises(error, match=words):
        export(model, encoded, example, path)
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import onnx_ir

    def save(model, path, **options):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    path = tmp_path / "m.onnx"
    path.write_bytes(b"the old file")
    monkeypatch.setattr(onnx_ir, "save", save)
    with pytest.raises(OSError, match="No space left"):
        export(*fresh(), path)
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"the old file")]


def test_missing_folder_and_missing_extra_are_said_first(tmp_path, monkeypatch):
    model, encoded, example = fresh()
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(model, encoded, example, tmp_path / "absent" / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r'onnxscript.*pip install "stepwell\[onnx\]"'):
        export(model, encoded, "nonsense", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
