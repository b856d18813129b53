"""DequantizeLinear: what is in the file, read without our reader, and that onnxruntime computes with exactly that."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.export import onnx_held, qdq

from .conftest import RECIPES, expected


def run(path, *inputs: torch.Tensor, level: str | None = "1") -> np.ndarray:
    """Run a file as a user would, without any of our code; None leaves onnxruntime's default."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {part.name: value.numpy() for part, value in zip(session.get_inputs(), inputs, strict=True)})[0]


def error(path, model, encoded, *inputs, level: str | None = "1") -> float:
    """Return the largest difference, relative to the largest output."""
    reference = expected(model, encoded, *inputs).numpy()
    return float(np.abs(run(path, *inputs, level=level) - reference).max() / np.abs(reference).max())


class Convolutions(nn.Module):
    """One of each: two dimensions with a batch norm after it, groups, one dimension, transposed, and a Linear of three outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.line = nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(8, 16, 3, stride=2)
        self.back, self.head = nn.ConvTranspose1d(16, 4, 3), nn.Linear(4, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = self.grouped(self.norm(self.first(x)).relu()).flatten(2)
        return self.head(self.back(self.line(x).relu()).mean(-1))


GRIDS = {
    "channels": {"*": sw.int4(block="channel")},
    "blocks, 3 bits in 4": {"head": sw.int2(block=4), "line": sw.int3(block=8), "*": sw.int3(block=9)},
    "ternary tensors": {"head": sw.int8(block=None), "*": sw.ternary(block=None)},
    "affine, 6 bits in 8": {"head": sw.int2(block="channel", levels="affine"), "*": sw.intn(6, block="channel", levels="affine")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_convolutions_of_every_kind_are_computed_from_their_codes(tmp_path, name):
    torch.manual_seed(0)
    model, example = Convolutions(), (torch.randn(2, 3, 8, 8),)
    encoded = sw.ptq.rtn(model, GRIDS[name])
    encoded["back.weight"] = sw.int4(block="channel").encode(model.back.weight.detach())
    exported = sw.export.onnx_qdq(model, encoded, example, tmp_path / "m.onnx")
    assert exported.floats == {}
    assert exported.products == dict.fromkeys(encoded, 1)
    assert error(tmp_path / "m.onnx", model, encoded, torch.randn(5, 3, 8, 8)) < 1e-6  # sums of at most 72 float32 products
    certificate = sw.verify(tmp_path / "m.onnx", model, example, encoded)
    assert certificate.passed
    assert certificate.codes_equal is certificate.scales_equal is certificate.values_equal is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8 bits and affine", "language", "Conv1D", "three dimensions"])
def test_recipes_of_the_other_form_are_exact_with_float32_activations(tmp_path, name):
    build, grid, shape, sequence = RECIPES[name]
    torch.manual_seed(0)
    model, example = build(), (torch.randint(48, shape),) if name == "language" else (torch.randn(shape),)
    encoded = sw.ptq.rtn(model, grid)
    exported = sw.export.onnx_qdq(model, encoded, example, tmp_path / "m.onnx", sequence=sequence)
    assert set(exported.products) == set(encoded)
    assert exported.floats == {}
    longer = (torch.cat([example[0], example[0][:, :3]], dim=1),) if sequence else (torch.cat([example[0], example[0]]),)
    assert error(tmp_path / "m.onnx", model, encoded, *longer) < 1e-6
    assert sw.verify(tmp_path / "m.onnx", model, example, encoded).passed


class Side(nn.Module):
    """Layers of three and eight outputs beside each other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, outputs) for outputs in (3, 8, 3, 8))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


@pytest.mark.parametrize("levels", ["full", "affine"])
def test_two_bits_are_exact_at_any_number_of_outputs(tmp_path, levels):
    """onnxruntime 1.31 makes a kernel with wrong codes where the rows of 2-bit codes, as products read them, do not fill bytes."""
    torch.manual_seed(0)
    model = Side()
    encoded = sw.ptq.rtn(model, {"layers.[01]": sw.int2(block=16, levels=levels), "*": sw.int2(block="channel", levels=levels)})
    sw.export.onnx_qdq(model, encoded, (torch.randn(2, 5, 32),), tmp_path / "m.onnx")
    assert error(tmp_path / "m.onnx", model, encoded, torch.randn(3, 5, 32)) < 1e-6
    assert [entry.version for entry in onnx.load(str(tmp_path / "m.onnx")).opset_import] == [25]


def test_codes_scales_and_zero_points_in_the_file_are_those_encoded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 5))
    encoded = sw.ptq.rtn(model, {"0": sw.target("onnx:qdq"), "1": sw.int4(block=8, levels="affine")})
    sw.export.onnx_qdq(model, encoded, (torch.randn(2, 64),), tmp_path / "m.onnx")
    file = onnx.load(str(tmp_path / "m.onnx"))
    tensors = {tensor.name: tensor for tensor in file.graph.initializer}
    nodes = {node.name: node for node in file.graph.node if node.op_type == "DequantizeLinear"}
    assert set(nodes) == {"0.weight#1", "1.weight#1"}
    for name, node in nodes.items():
        weight = encoded[name.partition("#")[0]]
        parts = [onnx.numpy_helper.to_array(tensors[part]) for part in node.input]
        kind = onnx.TensorProto.INT4 if weight.zero_points is None else onnx.TensorProto.UINT4
        assert tensors[node.input[0]].data_type == kind
        assert len(tensors[node.input[0]].raw_data) == weight.codes.numel() // 2  # two codes to a byte
        assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": weight.quantizer.block}
        assert np.array_equal(parts[0].astype(np.int64), weight.codes.T.long().numpy())  # products read (inputs, outputs)
        assert parts[1].tobytes() == weight.scales.T.contiguous().numpy().tobytes()
        assert len(parts) == (2 if weight.zero_points is None else 3)
        if weight.zero_points is not None:
            assert np.array_equal(parts[2].astype(np.int64), weight.zero_points.T.long().numpy())
    floats = [tuple(tensor.dims) for tensor in file.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert not {(64, 24), (24, 64), (24, 5), (5, 24)} & set(floats)


class Packed(nn.Module):
    """Attention whose packed projections are split two and three ways, and a Linear of which three slices are used apart."""

    def __init__(self):
        super().__init__()
        self.two, self.three = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))
        self.rows = nn.Linear(32, 96)

    def forward(self, x, y):
        h = self.two(x, y, y, need_weights=False)[0]
        h = h + self.three(x, y, 2 * y, need_weights=False)[0]
        one, two, three = self.rows.weight[:32], self.rows.weight[32:64], self.rows.weight[64:]
        return nn.functional.linear(h, one, self.rows.bias[:32]) + nn.functional.linear(h, two) + h @ three.t()


class Rows(nn.Module):
    """One weight of which rows are used apart: in equal chunks, in unequal ones, and as slices."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(32, 48).weight

    def forward(self, x):
        one, two, three = self.weight.chunk(3)
        parts = [*self.weight.split([16, 32]), self.weight[16:32], self.weight[32:]]
        return sum(nn.functional.linear(x, part).sum(-1, keepdim=True) for part in parts) + (x @ one.t()) * (x @ two.t()) * (x @ three.t())


@pytest.mark.parametrize("form", [sw.export.onnx, sw.export.onnx_qdq])
def test_rows_of_a_weight_are_cut_with_their_codes(tmp_path, form):
    torch.manual_seed(0)
    model, x = Rows(), torch.randn(3, 32)
    encoded = {"weight": sw.int4(block=16, levels="affine").encode(model.weight.detach())}
    exported = form(model, encoded, (x,), tmp_path / "m.onnx")
    assert exported.floats == {}
    assert error(tmp_path / "m.onnx", model, encoded, torch.randn(5, 32)) < 1e-6
    certificate = sw.verify(tmp_path / "m.onnx", model, (x,), encoded)
    assert certificate.passed
    assert certificate.codes_equal
    assert certificate.layers[0].nodes == exported.products["weight"] >= 4
    wrong = {"weight": encoded["weight"]._replace(codes=encoded["weight"].codes.roll(1, 0))}
    [layer] = sw.verify(tmp_path / "m.onnx", model, (x,), wrong).layers
    assert (layer.codes_equal, layer.scales_equal) == (False, True)


@pytest.mark.slow
@pytest.mark.parametrize("form", [sw.export.onnx, sw.export.onnx_qdq])
def test_packed_projections_are_cut_into_products_of_their_own(tmp_path, form):
    torch.manual_seed(0)
    model, example = Packed(), (torch.randn(1, 5, 32), torch.randn(1, 7, 32))
    encoded = sw.ptq.rtn(model, sw.int4(block=16))
    exported = form(model, encoded, example, tmp_path / "m.onnx")
    assert exported.floats == {}
    assert exported.products == {
        "two.in_proj_weight": 2, "two.out_proj.weight": 1, "three.in_proj_weight": 3, "three.out_proj.weight": 1, "rows.weight": 3
    }  # fmt: skip
    operators = [node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert operators.count("MatMulNBits" if form is sw.export.onnx else "DequantizeLinear") == 10
    inputs = torch.randn(3, 5, 32), torch.randn(3, 7, 32)
    assert error(tmp_path / "m.onnx", model, encoded, *inputs) < 1e-6
    certificate = sw.verify(tmp_path / "m.onnx", model, inputs, encoded)
    assert certificate.passed
    assert certificate.codes_equal


HELD = [
    sw.int4(block=16), sw.int8(block="channel"), sw.int2(block=None), sw.int3(block=24), sw.int4(block=8, levels="affine"),
    sw.int2(block="channel", levels="affine"), sw.intn(5, block=16, axis=0), sw.intn(4, block="channel", axis=0, levels="affine"),
]  # fmt: skip


@pytest.mark.parametrize("grid", HELD, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_operator_form_decodes_to_the_same_bits_and_survives_reading(grid, flipped):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    encoded = grid.encode(weight.T.contiguous() if grid.axis == 0 else weight)
    held = qdq.hold(encoded)
    assert np.array_equal(held.decode(), (encoded.decode().T if grid.axis == 0 else encoded.decode()).numpy())
    for blocks in (False, True):
        parts = qdq.to_parts(held, flipped=flipped, blocks=blocks)
        read = qdq.from_parts(parts)
        assert read.same(held)
        assert read.stored_zeros == held.stored_zeros
    assert held.rows(1, 3).same(qdq.from_parts(qdq.to_parts(held.rows(1, 3), flipped=flipped)))


@pytest.mark.parametrize(
    ("grid", "words"),
    [(sw.int4(levels="mid"), "int4/mid"), (sw.mxfp4(), "fp4_e2m1"), (sw.intn(4, compute="bf16"), "compute='bf16'")],
)
def test_other_grids_are_refused_and_who_holds_them_is_said(tmp_path, grid, words):
    model = nn.Sequential(nn.Linear(64, 24))
    with pytest.raises(ValueError, match=words) as raised:
        sw.export.onnx_qdq(model, {"0.weight": grid.encode(model[0].weight)}, (torch.randn(2, 64),), tmp_path / "m.onnx")
    assert "target('onnx:qdq')" in str(raised.value)
    assert ("gguf:mxfp4" in str(raised.value)) == (words == "fp4_e2m1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["codes", "axis", "block", "scales", "zeros", "type"])
def test_parts_that_do_not_fit_are_refused(change):
    parts = qdq.to_parts(qdq.hold(sw.int4(block=16, levels="affine").encode(torch.randn(6, 48))), flipped=True)
    assert parts.zeros is not None
    broken = {
        "codes": parts._replace(codes=parts.codes[1:]),
        "axis": parts._replace(axis=2),
        "block": parts._replace(block=12),
        "scales": parts._replace(scales=parts.scales[:, 1:]),
        "zeros": parts._replace(zeros=parts.zeros[1:]),
        "type": parts._replace(codes=parts.codes.astype(np.int32)),
    }[change]
    with pytest.raises(ValueError, match="a DequantizeLinear node"):
        qdq.from_parts(broken)


def test_names_of_operators_are_read_back():
    for parameter, rows in (("a.weight", None), ("a.in_proj_weight", (0, 64)), ("odd[x]", None)):
        assert onnx_held.named(onnx_held.name(parameter, rows, 3)) == (parameter, rows)
    assert onnx_held.named("MatMul_7") == ("MatMul_7", None)
