"""Layers: what onnxruntime's kernels compute, one product at a time, on the inputs that they really got.

A copy of the file also returns what goes into and comes out of every product with an encoded weight. The same product is computed here in
float64, with and without what the kernel may do to its activations; the nearest model says what the kernel does, and how far it is off.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepwell.export import nbits, onnx_file, qdq

PLAIN, INT8 = "float32", "int8 activations"  # how kinds begin
THROUGH = ("Transpose", "Reshape", "Identity")  # between DequantizeLinear and what reads the weight
PRODUCTS = (nbits.OPERATOR, "MatMul", "Gemm", "Conv")


class Kernel(NamedTuple):
    """How one product was found to be computed.

    Attributes:
        kind: "float32", or what happens to its activations.
        error: largest difference from that, relative to the largest output.
    """

    kind: str
    error: float


class _Tap(NamedTuple):
    """One product: the node that holds the weight, the operator, and the values before and after it; grid of its activations if rounded."""

    holder: str
    operator: Any
    source: str
    result: str
    grid: tuple[NDArray[Any], NDArray[Any]] | None


def kernels(path: Path, file: onnx_file.OnnxFile, example: tuple[Tensor, ...], *, float32: bool = True) -> dict[str, Kernel]:
    """Return, for every node that holds codes, how the product with them is computed; lookups and other operators are left out.

    Args:
        path: the file.
        file: what was read from it.
        example: inputs on which to look.
        float32: as for `onnx_file.load`.
    """
    import onnx

    model = onnx.load(str(path))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    taps = list(_taps(model.graph, {product.node for product in file.products}, tensors))
    present = {value.name for value in (*model.graph.output, *model.graph.input)}
    wanted = dict.fromkeys(name for tap in taps for name in (tap.source, tap.result) if name not in present)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted)
    with TemporaryDirectory() as folder:
        copy, optimized = Path(folder) / "tapped.onnx", Path(folder) / "optimized.onnx"
        large = model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF
        onnx.save(model, str(copy), save_as_external_data=large)
        found = onnx_file.load(copy, float32=float32, optimized=optimized).run(example)
        ran = onnx.load(str(optimized), load_external_data=False).graph.node
    values = dict(zip([value.name for value in model.graph.output], found, strict=True))
    values |= {value.name: part.numpy() for value, part in zip(model.graph.input, example, strict=True)}
    fused = {node.output[0]: node for node in ran if node.op_type == nbits.OPERATOR}
    weights = {product.node: product.held.decode().astype(np.float64) for product in file.products}
    biases = {name: onnx.numpy_helper.to_array(tensors[name]) for tap in taps if (name := _bias(tap.operator)) in tensors}
    return {tap.holder: _nearest(tap, weights[tap.holder], biases, values, fused.get(tap.result)) for tap in taps}


def _taps(graph: Any, holders: set[str], tensors: Mapping[str, Any]) -> Iterator[_Tap]:
    """Yield the products of the main graph that read a node's weight."""
    from onnx import numpy_helper

    readers: dict[str, list[Any]] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for holder in (node for node in graph.node if node.name in holders):
        operators = [holder] if holder.op_type == nbits.OPERATOR else list(_readers(holder, readers))
        for operator in operators[:1] if operators and operators[0].op_type in PRODUCTS else []:
            source, grid, maker = operator.input[0], None, makers.get(operator.input[0])
            before = makers.get(maker.input[0]) if maker is not None and maker.op_type == qdq.OPERATOR else None
            if before is not None and before.op_type == "QuantizeLinear" and len(before.input) > 2 and before.input[1] in tensors:
                source = before.input[0]
                scale, zero = (numpy_helper.to_array(tensors[name]) for name in before.input[1:3])
                grid = scale, zero
            yield _Tap(holder.name, operator, source, operator.output[0], grid)


def _readers(node: Any, readers: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    """Yield what reads a node's weight, through changes of its layout."""
    for reader in readers.get(node.output[0], ()):
        if reader.op_type in THROUGH:
            yield from _readers(reader, readers)
        else:
            yield reader


def _bias(operator: Any) -> str:
    """Return the name of the constant that an operator adds, or an empty one."""
    place = {"Gemm": 2, "Conv": 2, nbits.OPERATOR: 5}.get(operator.op_type, len(operator.input))
    return str(operator.input[place]) if place < len(operator.input) else ""


def _nearest(
    tap: _Tap, weight: NDArray[np.float64], biases: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]], fused: Any
) -> Kernel:
    """Return the model of a product that is nearest to what came out of it."""
    inputs, result = values[tap.source], values[tap.result].astype(np.float64)
    rounded, kind = inputs, PLAIN
    if tap.grid is not None:
        rounded, kind = static(inputs, *tap.grid), f"{tap.grid[1].dtype} activations, as the file says"
    trials = [(kind, rounded)]
    level = {attribute.name: attribute.i for attribute in fused.attribute} if fused is not None else {}
    if level.get("accuracy_level") == nbits.INT8:
        trials.append((f"{INT8} per block of {level['block_size']}", per_block(rounded, level["block_size"])))
    bias = biases.get(_bias(tap.operator))
    found = []
    for kind, activations in trials:
        modelled = _compute(tap.operator, activations.astype(np.float64), weight, bias)
        largest = np.abs(modelled).max(initial=0.0)
        difference = float(np.abs(modelled - result).max(initial=0.0))
        found.append(Kernel(kind, float(difference / largest) if largest else difference))
    return min(found, key=lambda kernel: kernel.error)


def _compute(operator: Any, inputs: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[Any] | None) -> NDArray[np.float64]:
    """Return a product in float64; the weight is rows of outputs."""
    if operator.op_type != "Conv":
        return inputs @ weight.T + (0.0 if bias is None else bias.astype(np.float64))
    field = {attribute.name: list(attribute.ints) or attribute.i for attribute in operator.attribute}
    dimensions, group = inputs.ndim - 2, int(field.get("group", 1))
    sizes = field["kernel_shape"]
    pads = field.get("pads", [0] * 2 * dimensions)
    padding = [amount for axis in reversed(range(dimensions)) for amount in (pads[axis], pads[dimensions + axis])]
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[dimensions - 1]
    kernel = torch.from_numpy(weight).reshape(len(weight), inputs.shape[1] // group, *sizes)
    padded = torch.nn.functional.pad(torch.from_numpy(inputs), padding)
    strides, spread = (field.get(name, [1] * dimensions) for name in ("strides", "dilations"))
    found = convolve(padded, kernel, None if bias is None else torch.tensor(bias, dtype=torch.float64), strides, 0, spread, group)
    return np.asarray(found.numpy(), np.float64)


def per_block(inputs: NDArray[np.float32], block: int) -> NDArray[np.float64]:
    """Return activations as MatMulNBits rounds them at accuracy level 4: `block` inputs share a scale, their largest magnitude over 127."""
    width = inputs.shape[-1]
    filled = np.pad(inputs, [(0, 0)] * (inputs.ndim - 1) + [(0, -width % block)]).reshape(*inputs.shape[:-1], -1, block)
    scale = np.abs(filled).max(axis=-1, keepdims=True) / np.float32(127)
    factor = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return (np.rint(filled * factor).astype(np.float64) * scale).reshape(*inputs.shape[:-1], -1)[..., :width]


def static(inputs: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[Any]) -> NDArray[np.float64]:
    """Return activations after QuantizeLinear and DequantizeLinear: divided in float32, ties to even, clamped to the integers' range."""
    ends = np.iinfo(zero.dtype)
    codes = np.clip(np.rint(inputs / scale).astype(np.float64) + int(zero), ends.min, ends.max)
    return np.asarray((codes - int(zero)) * np.float64(scale))
