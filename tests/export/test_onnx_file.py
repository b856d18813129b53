"""The reader of ONNX files: what a good file holds, whoever wrote it, and one line for what does not hold together."""

import json
import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from stepwell.export import onnx_file, onnx_held

SCALES = np.linspace(0.5, 2.0, 8, dtype=np.float32)
CODES = np.arange(4 * 2 * 16, dtype=np.uint8).reshape(4, 2, 16)

WITH_ZEROS = ("x", "codes", "scales", "zeros")


def constants(**changes):
    """Return the constants of a MatMulNBits node of four outputs and 64 inputs in blocks of 32."""
    made = {
        "codes": helper.make_tensor("codes", TensorProto.UINT8, [4, 2, 16], CODES.tobytes(), raw=True),
        "scales": helper.make_tensor("scales", TensorProto.FLOAT, [8], SCALES.tobytes(), raw=True),
    }
    return {**made, **changes}


def product(inputs=("x", "codes", "scales"), output="y", **fields):
    sizes = {"K": 64, "N": 4, "bits": 4, "block_size": 32}
    kept = {name: value for name, value in (sizes | fields).items() if value is not None}
    return helper.make_node("MatMulNBits", list(inputs), [output], domain="com.microsoft", name="layer.weight#1", **kept)


def dequantize(**fields):
    return helper.make_node(
        "DequantizeLinear", ["codes", "scales"], ["w"], name="layer.weight#1", **({"axis": 1, "block_size": 16} | fields)
    )


def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def written(path, nodes, tensors, *, inputs=None, metadata=None):
    """Write a model of these nodes and constants, with `y` as its output."""
    graph = helper.make_graph(nodes, "g", inputs or [value("x", 1, 64)], [value("y", 1, 4)], list(tensors))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    for key, text in (metadata or {}).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    path.write_bytes(model.SerializeToString())
    return path


def outside(tensor, location, **places):
    """Move a constant's data into another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **places}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(text)
    return tensor


def test_codes_scales_and_the_offset_are_read_by_hand(tmp_path):
    found = onnx_file.read(written(tmp_path / "m.onnx", [product()], [*constants().values(), onnx.numpy_helper.from_array(SCALES, "rest")]))
    (one,) = found.products
    assert (one.node, one.parameter, one.rows, one.operator, one.accuracy) == ("layer.weight#1", "layer.weight", None, "MatMulNBits", 0)
    # the first code of a byte in its low half; without zero points the middle of four bits, 8, stands for zero
    low, high = (CODES & 15).reshape(4, 2, 16, 1), (CODES >> 4).reshape(4, 2, 16, 1)
    whole = np.concatenate([low, high], axis=3).reshape(4, 2, 32).astype(np.float32)
    assert np.array_equal(one.held.decode(), ((whole - 8) * SCALES.reshape(4, 2, 1)).reshape(4, 64))
    assert list(found.arrays) == ["rest"]
    assert not found.dequantized


def test_a_node_inside_a_branch_is_found(tmp_path):
    branch = helper.make_graph([product(output="inner")], "branch", [], [value("inner", 1, 4)], list(constants().values()))
    chosen = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    found = onnx_file.read(written(tmp_path / "m.onnx", [chosen], [yes]))
    assert [one.parameter for one in found.products] == ["layer.weight"] * 2


def test_only_narrow_constants_behind_the_operator_are_weights(tmp_path):
    codes = helper.make_tensor("codes", TensorProto.INT4, [2, 32], bytes(32), raw=True)
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [2, 2], np.ones(4, np.float32).tobytes(), raw=True)
    bias = helper.make_tensor("bias", TensorProto.INT32, [2], bytes(8), raw=True)
    one = helper.make_tensor("one", TensorProto.FLOAT, [], bytes(4), raw=True)
    nodes = [
        dequantize(),
        helper.make_node("DequantizeLinear", ["bias", "one"], ["b"]),
        helper.make_node("DequantizeLinear", ["x", "one"], ["y"]),
    ]
    found = onnx_file.read(written(tmp_path / "m.onnx", nodes, [codes, scales, bias, one]))
    assert found.dequantized
    assert [(product.operator, product.accuracy) for product in found.products] == [("DequantizeLinear", None)]
    assert set(found.arrays) == {"bias", "one"}


def test_what_the_file_says_of_its_float_weights_is_read(tmp_path):
    told = {"other": "nothing of ours", onnx_held.METADATA: json.dumps({"floats": {"head.weight": "embedding"}})}
    assert onnx_file.read(written(tmp_path / "m.onnx", [product()], constants().values(), metadata=told)).floats == {
        "head.weight": "embedding"
    }


@pytest.mark.parametrize("said", ["{", "[]", "{}", '{"floats": 3}', "null"])
def test_a_damaged_description_is_refused(tmp_path, said):
    path = written(tmp_path / "m.onnx", [product()], constants().values(), metadata={onnx_held.METADATA: said})
    with pytest.raises(ValueError, match="describes itself in a way that cannot be read"):
        onnx_file.read(path)


LYING = {
    "half of the codes are missing": ({"codes": helper.make_tensor("codes", TensorProto.UINT8, [4, 2, 8], bytes(64), raw=True)}, {}),
    "raw data is cut": ({"codes": ("codes", TensorProto.UINT8, [4, 2, 16], CODES.tobytes()[:100])}, {}),
    "a shape that no file could fill": ({"codes": ("codes", TensorProto.UINT8, [1 << 40, 2, 16], CODES.tobytes())}, {}),
    "a negative shape": ({"codes": ("codes", TensorProto.UINT8, [-4, 2, 16], CODES.tobytes())}, {}),
    "a type that is none": ({"codes": ("codes", 99, [4, 2, 16], CODES.tobytes())}, {}),
    "one scale too few": ({"scales": ("scales", TensorProto.FLOAT, [7], SCALES.tobytes()[:28])}, {}),
    "a width that does not exist": ({}, {"bits": 3}),
    "no block": ({}, {"block_size": 0}),
    "a negative block": ({}, {"block_size": -32}),
    "more inputs than codes": ({}, {"K": 1 << 40}),
    "no outputs": ({}, {"N": None}),
    "computed codes": ({}, {"inputs": ("x", "elsewhere", "scales")}),
    "computed zero points": ({}, {"inputs": ("x", "codes", "scales", "elsewhere")}),
    "zero points of another type": ({"zeros": ("zeros", TensorProto.FLOAT, [8], SCALES.tobytes())}, {"inputs": WITH_ZEROS}),
    "zero points for half of the blocks": ({"zeros": ("zeros", TensorProto.UINT8, [2], bytes(2))}, {"inputs": WITH_ZEROS}),
    "too few inputs": ({}, {"inputs": ("x",)}),
}  # fmt: skip


def proto(given):
    """Return a constant as it was given, or made without the checks of onnx's own helper."""
    if isinstance(given, TensorProto):
        return given
    name, kind, shape, data = given
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=data)


@pytest.mark.parametrize("case", LYING)
def test_a_node_that_does_not_fit_its_parts_is_refused_by_name(tmp_path, case):
    changes, fields = LYING[case]
    path = written(tmp_path / "m.onnx", [product(**fields)], [proto(one) for one in constants(**changes).values()])
    with pytest.raises(ValueError, match=r"m\.onnx is not a readable ONNX model \(.+\)\.$") as caught:
        onnx_file.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("codes", "scales", "fields"),
    [
        ((TensorProto.INT8, [4, 32], bytes(128)), (TensorProto.FLOAT16, [4, 2], bytes(16)), {}),
        ((TensorProto.INT8, [4, 32], bytes(128)), (TensorProto.FLOAT, [4, 3], bytes(48)), {}),
        ((TensorProto.INT8, [4, 32], bytes(128)), (TensorProto.FLOAT, [4, 2], bytes(32)), {"axis": 2}),
        ((TensorProto.INT8, [4, 32], bytes(128)), (TensorProto.FLOAT, [4, 2], bytes(32)), {"block_size": 24}),
        ((TensorProto.INT8, [4, 32], bytes(128)), (TensorProto.FLOAT, [5], bytes(20)), {"axis": 0, "block_size": 0}),
    ],
)
def test_dequantize_nodes_of_wrong_types_and_shapes_are_refused(tmp_path, codes, scales, fields):
    path = written(tmp_path / "m.onnx", [dequantize(**fields)], [proto(("codes", *codes)), proto(("scales", *scales))])
    with pytest.raises(ValueError, match=r"a DequantizeLinear node .+"):
        onnx_file.read(path)


def test_data_in_a_second_file_is_read(tmp_path):
    (tmp_path / "data").write_bytes(bytes(64) + CODES.tobytes())
    codes = outside(constants()["codes"], "data", offset=64, length=128)
    plain = onnx_file.read(written(tmp_path / "plain.onnx", [product()], constants().values()))
    found = onnx_file.read(written(tmp_path / "m.onnx", [product()], constants(codes=codes).values()))
    assert np.array_equal(found.products[0].held.codes, plain.products[0].held.codes)


@pytest.mark.parametrize("location", ["../secret", "inside/../../secret", "/etc/hostname", "{folder}/secret", "link", "gone", "data", ""])
def test_data_elsewhere_is_never_read(tmp_path, location):
    """Another folder, an absolute path, a link that leads out, nothing, a file that is too short, no name: all refused."""
    (tmp_path / "secret").write_bytes(CODES.tobytes())
    inner = tmp_path / "inner"
    (inner / "inside").mkdir(parents=True)
    os.symlink(tmp_path / "secret", inner / "link")
    (inner / "data").write_bytes(CODES.tobytes()[:100])
    codes = outside(constants()["codes"], location.format(folder=tmp_path), offset=0, length=128)
    path = written(inner / "m.onnx", [product()], constants(codes=codes).values())
    with pytest.raises(ValueError, match="is not a readable ONNX model"):
        onnx_file.read(path)


def test_no_file_and_no_model_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*gone\.onnx"):
        onnx_file.read(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no protocol buffer at all")
    with pytest.raises(ValueError, match=r"text\.onnx is not a readable ONNX model"):
        onnx_file.read(tmp_path / "text.onnx")


def test_no_memory_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    path = written(tmp_path / "m.onnx", [product()], constants().values())

    def full(tensor):
        raise MemoryError

    monkeypatch.setattr(onnx.numpy_helper, "to_array", full)
    with pytest.raises(MemoryError):
        onnx_file.read(path)


def test_a_session_names_its_open_axes_and_refuses_what_does_not_fit(tmp_path):
    path = written(tmp_path / "m.onnx", [product()], constants().values(), inputs=[value("x", "batch", 64)])
    session = onnx_file.load(path, float32=False, biases=False, optimized=tmp_path / "ran.onnx")
    assert session.axes == ({0: "batch"},)
    held = onnx_file.read(path).products[0].held
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x.numpy() @ held.decode().T
    assert np.abs(session.run((x,))[0] - expected).max() < 1e-5 * np.abs(expected).max()
    assert (tmp_path / "ran.onnx").is_file()
    with pytest.raises(ValueError, match=r"`example` must hold 1 tensors for \['x'\]: got 2"):
        session.run((x, x))
    with pytest.raises(ValueError, match=r"does not run on inputs of shape .*onnxruntime says"):
        session.run((x[:, :32],))


def test_what_onnxruntime_refuses_is_said_with_its_reason(tmp_path):
    unknown = helper.make_node("NoSuchOperator", ["x"], ["y"])
    with pytest.raises(ValueError, match=r"onnxruntime does not load .*m\.onnx: .*NoSuchOperator"):
        onnx_file.load(written(tmp_path / "m.onnx", [unknown], []))
