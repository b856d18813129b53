"""`stepwell inspect FILE`: what a quantized file holds, read without running it.

Three kinds: safetensors written by `stepwell.save`, any other safetensors file, and ONNX models with `MatMulNBits` nodes.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from stepwell.commands.output import Json, print_json, print_table

Row = dict[str, object]


def inspect(file: Annotated[Path, typer.Argument(help="A .safetensors or .onnx file.")], *, json: Json = False) -> None:
    """Show the quantized weights of a file: grid, block, scales, bits per weight."""
    if file.is_dir():
        raise IsADirectoryError(f"`file`: {file} is a folder. Give a .safetensors or .onnx file in it.")
    if not file.is_file():
        raise FileNotFoundError(f"`file`: no file at {file}. Give a .safetensors or .onnx file.")
    kind, rows = read_onnx(file) if file.suffix == ".onnx" else read_safetensors(file)
    if json:
        print_json({"file": str(file), "kind": kind, "bytes": file.stat().st_size, "weights": rows})
    else:
        count = f", {len(rows)} weights" if rows else ""
        print_table(
            rows,
            title=f"{file.name}: {kind}{count}, {file.stat().st_size} bytes",
            note="" if rows else "No quantized weight in it that this command reads.",
        )


def read_safetensors(file: Path) -> tuple[str, list[Row]]:
    """Return the file's kind and one row per weight, or per tensor where `stepwell.save` did not write it.

    Raises:
        ValueError: not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            tensors = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
            ours = "stepwell" in (opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"`file`: {file} is not a readable safetensors file ({error}). Give one, or an .onnx model.") from error
    if ours:
        return "encoded weights", _encoded_rows(file, tensors)
    return "plain safetensors", [
        {"name": name, "dtype": dtype, "shape": shape, "bytes": _size(dtype, shape)} for name, (dtype, shape) in tensors.items()
    ]


def read_onnx(file: Path) -> tuple[str, list[Row]]:
    """Return the file's kind and one row per `MatMulNBits` node.

    Raises:
        ValueError: not an ONNX model.
        ModuleNotFoundError: the extra `onnx` is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading ONNX models needs the extra `onnx`: pip install 'stepwell[onnx]'") from error
    try:
        model = onnx.load(str(file), load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"`file`: {file} is not a readable ONNX model ({error}).") from error
    stored = {
        tensor.name: math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    }
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    rows = [_node_row(node, stored) for node in nodes]
    return ("ONNX model with MatMulNBits" if rows else _other_onnx(model.graph)), rows


def _other_onnx(graph: Any) -> str:
    """Say what an ONNX model without MatMulNBits nodes is: quantized in another way, or not at all."""
    other = sorted({node.op_type for node in graph.node if re.search("Quant|QLinear|QGemm|Integer|NBits|Bnb4", node.op_type)})
    if other:
        return f"ONNX model without MatMulNBits, quantized by {', '.join(other)}, which is not read here"
    return f"ONNX model without quantized weights, {len(graph.node)} nodes and {len(graph.initializer)} constants"


def _encoded_rows(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> list[Row]:
    """Return one row per encoded weight, with the size of all that is stored for it."""
    from stepwell.storage import read_header

    rows: list[Row] = []
    for name, entry in read_header(file)["weights"].items():
        size = sum(_size(*tensor) for key, tensor in tensors.items() if key.rpartition(".")[0] == name)
        rows.append(
            {
                "name": name,
                "shape": entry["shape"],
                "format": entry["format"],
                "block": "tensor" if entry["block"] is None else entry["block"],
                "scale": entry["rule"],
                "scale_dtype": entry["scale_dtype"],
                "bytes": size,
                "bits_per_weight": 8 * size / math.prod(entry["shape"]),
            }
        )
    return rows


def _node_row(node: Any, stored: dict[str, int]) -> Row:
    """Return what one MatMulNBits node holds; its inputs after the first are codes, scales and zero points."""
    field = {attribute.name: attribute.i for attribute in node.attribute}
    size = sum(stored.get(name, 0) for name in node.input[1:])
    return {
        "name": node.input[1],
        "shape": [field["N"], field["K"]],
        "bits": field.get("bits", 4),
        "block": field["block_size"],
        "zero_points": len(node.input) > 3 and bool(node.input[3]),
        "bytes": size,
        "bits_per_weight": 8 * size / (field["N"] * field["K"]),
    }


def _size(dtype: str, shape: list[int]) -> int:
    """Return the bytes of a stored tensor; safetensors' dtype names carry their width in bits (F32, BF16, F8_E4M3; BOOL takes eight)."""
    width = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(width[0]) if width else 8) // 8
