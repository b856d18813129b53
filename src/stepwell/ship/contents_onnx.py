"""Contents of ONNX files: the nodes that hold codes of weights, MatMulNBits and DequantizeLinear, read without their data."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepwell.export.extras import need

Row = dict[str, object]
PRODUCT, DEQUANTIZE = "MatMulNBits", "DequantizeLinear"
WIDTHS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8, "FLOAT4E2M1": 4}


def onnx_rows(path: Path) -> tuple[str, list[Row]]:
    """Return the file's kind and one row per node that holds codes.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ValueError: not an ONNX model.
    """
    need("onnx", extra="onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"`file`: {path} is not a readable ONNX model ({error}).") from error
    graphs = list(_graphs(model.graph))
    tensors = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    nodes = [node for graph in graphs for node in graph.node]
    products = [node for node in nodes if node.op_type == PRODUCT]
    dequantized = [node for node in nodes if node.op_type == DEQUANTIZE and _of_weight(node, tensors)]
    if not products and not dequantized:
        return _other(nodes, tensors), []
    kinds = " and ".join([PRODUCT] * bool(products) + [DEQUANTIZE] * bool(dequantized))
    rows = [*(_product_row(node, tensors) for node in products), *(_dequantize_row(node, tensors) for node in dequantized)]
    return f"ONNX model with {kinds}", rows


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _other(nodes: list[Any], tensors: Mapping[str, Any]) -> str:
    """Say what a model without such nodes is: quantized in another way, or not at all."""
    other = sorted({node.op_type for node in nodes if re.search("Quant|QLinear|QGemm|Integer|NBits|Bnb4", node.op_type)})
    if other:
        return f"ONNX model without MatMulNBits, quantized by {', '.join(other)}, which is not read here"
    return f"ONNX model without quantized weights, {len(nodes)} nodes and {len(tensors)} constants"


def _product_row(node: Any, tensors: Mapping[str, Any]) -> Row:
    """Return what one MatMulNBits node holds; its inputs after the first are codes, scales and zero points."""
    field = {attribute.name: attribute.i for attribute in node.attribute}
    sizes = {name: field.get(name, 0) for name in ("N", "K", "block_size")}
    if min(sizes.values()) < 1 or len(node.input) < 3:
        raise ValueError(f"MatMulNBits node {node.name!r} has N, K, block_size = {tuple(sizes.values())} and {len(node.input)} inputs")
    size = sum(_bytes(tensors[name]) for name in node.input[1:] if name in tensors)
    return {
        "name": node.input[1],
        "shape": [sizes["N"], sizes["K"]],
        "bits": field.get("bits", 4),
        "block": sizes["block_size"],
        "zero_points": len(node.input) > 3 and bool(node.input[3]),
        "bytes": size,
        "bits_per_weight": 8 * size / (sizes["N"] * sizes["K"]),
    }


def _dequantize_row(node: Any, tensors: Mapping[str, Any]) -> Row:
    """Return what one DequantizeLinear node holds; its inputs are codes, scales and zero points."""
    field = {attribute.name: attribute.i for attribute in node.attribute}
    shape = list(tensors[node.input[0]].dims)
    size = sum(_bytes(tensors[name]) for name in node.input if name in tensors)
    scales = math.prod(tensors[node.input[1]].dims) if len(node.input) > 1 and node.input[1] in tensors else 0
    block = field.get("block_size", 0) or ("channel" if scales > 1 else "tensor")
    return {
        "name": node.input[0],
        "shape": shape,
        "bits": WIDTHS[_kind(tensors[node.input[0]])],
        "block": block,
        "zero_points": len(node.input) > 2 and bool(node.input[2]),
        "bytes": size,
        "bits_per_weight": 8 * size / max(1, math.prod(shape)),
    }


def _of_weight(node: Any, tensors: Mapping[str, Any]) -> bool:
    """Say whether a node dequantizes a constant with codes of a known width; biases have 32 bits."""
    return bool(node.input) and node.input[0] in tensors and _kind(tensors[node.input[0]]) in WIDTHS


def _kind(tensor: Any) -> str:
    """Return the name of a tensor's type, or its number where it has none."""
    import onnx

    names = dict(zip(onnx.TensorProto.DataType.values(), onnx.TensorProto.DataType.keys(), strict=True))
    return str(names.get(tensor.data_type, tensor.data_type))


def _bytes(tensor: Any) -> int:
    """Return how many bytes a tensor takes by its shape and type."""
    import onnx

    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"tensor {tensor.name!r} has shape {list(tensor.dims)}")
    bits = WIDTHS.get(_kind(tensor)) or 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return -(-int(math.prod(tensor.dims)) * bits // 8)
