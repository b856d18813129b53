"""An ONNX file as a runtime loads it: the weights that its MatMulNBits and DequantizeLinear nodes hold, and a session that runs it."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepwell.export import nbits, onnx_held, qdq
from stepwell.export.extras import need
from stepwell.export.onnx_held import Held
from stepwell.export.trace import reason, sizes

BIASES = "WeightBiasQuantization"  # the optimizer of onnxruntime that rounds biases


class Product(NamedTuple):
    """One node that holds the codes of a weight.

    Attributes:
        node: its name in the file.
        parameter: the parameter that the name stands for, in files of ours.
        rows: the outputs of the parameter that it holds; None is all.
        held: the weight.
        operator: "MatMulNBits" or "DequantizeLinear".
        accuracy: of MatMulNBits: 0 and 1 compute in float32, 4 rounds activations to 8 bits; None for DequantizeLinear.
    """

    node: str
    parameter: str
    rows: tuple[int, int] | None
    held: Held
    operator: str
    accuracy: int | None


class OnnxFile(NamedTuple):
    """What a file holds.

    Attributes:
        products: every node that holds codes of a weight, in the graph's order.
        arrays: every other constant of the graph by name.
        floats: parameters that the export left in float, with its reason; empty in files of others.
    """

    products: tuple[Product, ...]
    arrays: Mapping[str, NDArray[Any]]
    floats: Mapping[str, str]

    @property
    def dequantized(self) -> bool:
        """Whether a weight lies behind DequantizeLinear."""
        return any(product.operator == qdq.OPERATOR for product in self.products)


def read(path: str | Path) -> OnnxFile:
    """Read the matrices of an ONNX file, whoever wrote it.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        FileNotFoundError: no such file.
        ValueError: no ONNX model, or a MatMulNBits node whose parts do not fit together.
    """
    need("onnx", extra="onnx")
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path`: no file at {path}. Give the file that `stepwell.export.onnx` wrote.")
    try:
        return _read(path)
    except MemoryError:
        raise
    except Exception as error:  # onnx, protobuf and numpy raise whatever a damaged file makes of their parts
        raise ValueError(f"`path`: {path} is not a readable ONNX model ({reason(error)}).") from error


def _read(path: str | Path) -> OnnxFile:
    """Read an ONNX file that may be damaged."""
    import onnx

    model = onnx.load(str(path))
    nodes, tensors = [], {}
    for graph in _graphs(model.graph):
        tensors.update({tensor.name: tensor for tensor in graph.initializer})
        nodes += list(graph.node)
    holders = [node for node in nodes if (node.op_type, node.domain) == (nbits.OPERATOR, nbits.DOMAIN) or _of_weight(node, tensors)]
    own = {name for node in holders for name in node.input[int(node.op_type == nbits.OPERATOR) :] if name}
    return OnnxFile(
        tuple(_product(node, tensors) for node in holders),
        {name: _array(tensor) for name, tensor in tensors.items() if name not in own},
        _floats(model.metadata_props, path),
    )


class Session(NamedTuple):
    """A file loaded by onnxruntime on the CPU.

    Attributes:
        axes: for every input, its open axes and their names.
        run: inputs -> all outputs, as arrays.
        version: of onnxruntime.
    """

    axes: tuple[dict[int, str], ...]
    run: Callable[[tuple[Tensor, ...]], list[NDArray[Any]]]
    version: str


def load(path: str | Path, *, float32: bool = True, biases: bool = True, optimized: Path | None = None) -> Session:
    """Load a file into onnxruntime on the CPU, with default optimizations.

    Args:
        path: the file.
        float32: whether the products that onnxruntime makes of DequantizeLinear leave activations in float32; its default rounds them.
        biases: whether onnxruntime may round biases of products with rounded activations to int32, which is its default.
        optimized: where to write the graph that it really runs.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ValueError: onnxruntime refuses the file.
    """
    need("onnxruntime", extra="onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    if float32:
        options.add_session_config_entry(qdq.OPTION, str(nbits.FLOAT32))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimized.name}.data")
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[] if biases else [BIASES]
        )
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ValueError(f"`path`: onnxruntime does not load {path}: {reason(error)}") from error
    inputs = session.get_inputs()

    def run(example: tuple[Tensor, ...]) -> list[NDArray[Any]]:
        if len(example) != len(inputs):
            raise ValueError(f"`example` must hold {len(inputs)} tensors for {[part.name for part in inputs]}: got {len(example)}.")
        feed = {part.name: np.ascontiguousarray(value.numpy()) for part, value in zip(inputs, example, strict=True)}
        try:
            return list(session.run(None, feed))
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ValueError(
                f"`example`: {path} does not run on inputs of shape {sizes(example)}. onnxruntime says: {reason(error)}"
            ) from error

    axes = tuple({axis: size for axis, size in enumerate(part.shape) if isinstance(size, str)} for part in inputs)
    return Session(axes, run, onnxruntime.__version__)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _of_weight(node: Any, tensors: Mapping[str, Any]) -> bool:
    """Whether a node dequantizes a constant of 2, 4 or 8 bits; biases have 32."""
    import onnx

    narrow = [getattr(onnx.TensorProto, f"{sign}INT{bits}", None) for bits in onnx_held.WIDTHS for sign in ("", "U")]
    known = node.op_type == qdq.OPERATOR and node.domain in ("", "ai.onnx") and node.input[0] in tensors
    return known and tensors[node.input[0]].data_type in narrow


def _product(node: Any, tensors: Mapping[str, Any]) -> Product:
    """Read one node and its constants."""
    field = {attribute.name: attribute.i for attribute in node.attribute}
    first = int(node.op_type == nbits.OPERATOR)
    names = [*node.input, *[""] * 4][first : first + 3]
    absent = [name for name in names[:2] if name not in tensors]
    if absent or (names[2] and names[2] not in tensors):
        raise ValueError(f"{node.op_type} node {node.name!r} must have constant weights: its inputs {absent or names[2:]} are computed.")
    codes, scales, zeros = (_array(tensors[name]) if name else None for name in names)
    assert codes is not None
    assert scales is not None
    parameter, rows = onnx_held.named(node.name)
    if node.op_type == qdq.OPERATOR:
        held = qdq.from_parts(qdq.Parts(codes, scales, zeros, field.get("axis", 1), field.get("block_size", 0)))
        return Product(node.name, parameter, rows, held, qdq.OPERATOR, None)
    missing = [name for name in ("N", "K", "block_size") if name not in field]
    if missing:
        raise ValueError(f"MatMulNBits node {node.name!r} has no attributes {', '.join(missing)}. The file may be damaged.")
    held = nbits.from_inputs(
        codes, scales, zeros, outputs=field["N"], inputs=field["K"], bits=field.get("bits", 4), block=field["block_size"]
    )
    return Product(node.name, parameter, rows, held, nbits.OPERATOR, field.get("accuracy_level", 0))


def _array(tensor: Any) -> NDArray[Any]:
    """Return a constant; a shape that its bytes cannot fill is refused before onnx makes room for it."""
    import onnx

    most = 8 * tensor.ByteSize()  # numbers of one bit
    if min(tensor.dims, default=1) < 0 or max(tensor.dims, default=1) > most or math.prod(tensor.dims) > most:
        raise ValueError(f"constant {tensor.name!r} of {tensor.ByteSize()} bytes cannot have shape {list(tensor.dims)}")
    found: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
    return found


def _floats(properties: Any, path: str | Path) -> dict[str, str]:
    """Read the export's own list of float weights."""
    for entry in properties:
        if entry.key == onnx_held.METADATA:
            try:
                return dict(json.loads(entry.value)["floats"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"`path`: {path} describes itself in a way that cannot be read ({error!r}).") from error
    return {}
