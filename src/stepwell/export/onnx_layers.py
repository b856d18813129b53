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

from stepwell.activation_grids import LOW, Range
from stepwell.export import nbits, onnx_file, qdq

PLAIN = "float32"
INT8, STATIC = "int8 activations", "activations that the file rounds to"  # how other kinds begin
DYNAMIC = "activations that the file rounds to int8 per token"
BIAS = " and a bias that onnxruntime rounds to int32"
THROUGH = ("Transpose", "Reshape", "Identity")  # between DequantizeLinear and what reads the weight
PRODUCTS = (nbits.OPERATOR, "MatMul", "Gemm", "Conv")


class Kernel(NamedTuple):
    """How one product was found to be computed.

    Attributes:
        kind: "float32", or what happens to its activations.
        error: largest difference from that, relative to the largest output.
        range: on which the file rounds its activations, if it does.
    """

    kind: str
    error: float
    range: Range | None


class _Tap(NamedTuple):
    """One product: the node that holds the weight, the operator, and the values before and after it.

    The range of its activations as the file rounds them, and whether they are rounded between the two values: per token without a range.
    """

    holder: str
    operator: Any
    source: str
    result: str
    grid: tuple[NDArray[Any], NDArray[Any]] | None
    inside: bool


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
        found = onnx_file.load(save(model, copy), float32=float32, optimized=optimized).run(example)
        ran = onnx.load(str(optimized)).graph
    values = dict(zip([value.name for value in model.graph.output], found, strict=True))
    values |= {value.name: part.numpy() for value, part in zip(model.graph.input, example, strict=True)}
    weights = {product.node: product.held.decode().astype(np.float64) for product in file.products}
    operators = {name: node for node in ran.node for name in node.output}
    constants = {tensor.name: tensor for tensor in ran.initializer}
    return {tap.holder: _nearest(tap, weights[tap.holder], values, _Ran(tap.result, operators, constants)) for tap in taps}


def save(model: Any, path: Path) -> Path:
    """Save a changed model, in two files where one cannot hold it, and return its path."""
    import onnx

    onnx.save(model, str(path), save_as_external_data=model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF)
    return path


def _taps(graph: Any, holders: set[str], tensors: Mapping[str, Any]) -> Iterator[_Tap]:
    """Yield the products of the main graph that read a node's weight."""
    readers: dict[str, list[Any]] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for holder in (node for node in graph.node if node.name in holders):
        operators = [holder] if holder.op_type == nbits.OPERATOR else list(_readers(holder, readers))
        for operator in operators[:1] if operators and operators[0].op_type in PRODUCTS else []:
            source = operator.input[0]
            while source in makers and makers[source].op_type in THROUGH:
                source = makers[source].input[0]
            maker = makers.get(source)
            before = makers.get(maker.input[0]) if maker is not None and maker.op_type == qdq.OPERATOR else None
            plain, result, token = operator.input[0], operator.output[0], per_token_source(operator.input[0], makers)
            if before is None or before.op_type != "QuantizeLinear" or len(before.input) < 3 or not set(before.input[1:]) <= set(tensors):
                yield _Tap(holder.name, operator, token or plain, result, None, token is not None)
            else:
                scale, zero = (_array(tensors[name]) for name in before.input[1:3])
                inside = source == plain
                yield _Tap(holder.name, operator, before.input[0] if inside else plain, result, (scale, zero), inside)


def per_token_source(name: str, makers: Mapping[str, Any]) -> str | None:
    """Return what a value is where it is rounded per token, `round(x / scale) * scale` as traced; None where it is not."""
    maker = makers.get(name)
    for part in maker.input if maker is not None and maker.op_type == "Mul" else ():
        rounding = makers.get(part)
        division = makers.get(rounding.input[0]) if rounding is not None and rounding.op_type == "Round" else None
        if division is not None and division.op_type == "Div":
            return str(division.input[0])
    return None


def _readers(node: Any, readers: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    """Yield what reads a node's weight, through changes of its layout."""
    for reader in readers.get(node.output[0], ()):
        if reader.op_type in THROUGH:
            yield from _readers(reader, readers)
        else:
            yield reader


class _Ran:
    """What onnxruntime made of an operator: its kernel's own rounding of activations, and the bias that it really adds."""

    def __init__(self, result: str, operators: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        operator = operators.get(result)
        fields = {} if operator is None else {attribute.name: attribute.i for attribute in operator.attribute}
        fused = operator is not None and operator.op_type == nbits.OPERATOR and fields.get("accuracy_level") == nbits.INT8
        self.block = fields["block_size"] if fused else None
        self.bias: NDArray[np.float64] | None = None
        self.rounded_bias = False
        names = [] if operator is None else operator.input[5:6] if operator.op_type == nbits.OPERATOR else operator.input[2:3]
        for name in names if operator is not None and operator.op_type.removeprefix("Fused") in PRODUCTS else []:
            maker = operators.get(name)
            if maker is not None and maker.op_type == qdq.OPERATOR:
                self.bias, self.rounded_bias = _dequantized(maker, constants), True
            elif name in constants:
                self.bias = _array(constants[name]).astype(np.float64)


def _dequantized(node: Any, constants: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return a vector that onnxruntime chose to store as integers."""
    codes, scale, *zero = (_array(constants[name]).astype(np.float64) for name in node.input if name)
    return np.asarray((codes - (zero[0] if zero else 0.0)) * scale)


def _array(tensor: Any) -> NDArray[Any]:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor))


def _nearest(tap: _Tap, weight: NDArray[np.float64], values: Mapping[str, NDArray[Any]], ran: _Ran) -> Kernel:
    """Return the model of a product that is nearest to what came out of it."""
    inputs, result = values[tap.source], values[tap.result].astype(np.float64)
    rounded, kind, limits = inputs, PLAIN, None
    if tap.grid is not None:
        scale, zero = tap.grid
        rounded, kind = static(inputs, scale, zero) if tap.inside else inputs, f"{STATIC} {zero.dtype}"
        limits = Range(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]) + LOW - np.iinfo(zero.dtype).min) if scale.size == 1 else None
    elif tap.inside:
        rounded, kind = per_token(inputs, tuple(range(1, inputs.ndim)) if tap.operator.op_type == "Conv" else (-1,)), DYNAMIC
    trials = [(kind, rounded)]
    if ran.block is not None:
        trials.append((f"{INT8} per block of {ran.block}", per_block(rounded, ran.block)))
    found = []
    for kind, activations in trials:
        modelled = _compute(tap.operator, activations.astype(np.float64), weight, ran.bias)
        largest = np.abs(modelled).max(initial=0.0)
        difference = float(np.abs(modelled - result).max(initial=0.0))
        found.append(Kernel(kind + (BIAS if ran.rounded_bias else ""), float(difference / largest) if largest else difference, limits))
    return min(found, key=lambda kernel: kernel.error)


def _compute(operator: Any, inputs: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[Any] | None) -> NDArray[np.float64]:
    """Return a product in float64; the weight is rows of outputs."""
    if operator.op_type != "Conv":
        return inputs @ weight.T + (0.0 if bias is None else bias.astype(np.float64))
    field: dict[str, Any] = {attribute.name: list(attribute.ints) or attribute.i for attribute in operator.attribute}
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
    largest = np.abs(filled).max(axis=-1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)  # the kernel multiplies by the inverse
    codes = np.rint(filled * factor).astype(np.float64)
    return np.asarray((codes * (largest / np.float32(127))).reshape(*inputs.shape[:-1], -1)[..., :width], np.float64)


def per_token(inputs: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    """Return activations on a symmetric 8-bit grid of their token, in float32 throughout."""
    scale = np.abs(inputs).max(axis=axes, keepdims=True) / np.float32(127)
    return np.asarray(np.rint(inputs / np.where(scale > 0, scale, np.float32(1))) * scale, np.float32)


def static(inputs: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[Any]) -> NDArray[np.float64]:
    """Return activations after QuantizeLinear and DequantizeLinear: divided in float32, ties to even, clamped to the integers' range."""
    ends = np.iinfo(zero.dtype)
    codes = np.clip(np.rint(inputs / scale).astype(np.float64) + int(zero), ends.min, ends.max)
    return np.asarray((codes - int(zero)) * np.float64(scale))
