"""Graph edits: encoded weights in a traced graph become codes, either inside MatMulNBits operators or behind DequantizeLinear.

Weights are found by value, among initializers that the exporter may have renamed or transposed; names only decide between equal values.
What splits or slices a packed weight (attention projections) is looked through, and its codes are cut instead.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepwell.export import nbits, onnx_held, qdq
from stepwell.export.deployed import plain
from stepwell.export.onnx_held import Held
from stepwell.quantizers import Encoded


class Weight(NamedTuple):
    """An encoded weight on its way into the graph.

    Attributes:
        name: what `encoded` calls it.
        aliases: all names of the parameter.
        held: what the file shall hold, rows of outputs; None for a weight that stays in float.
        value: what the traced model holds, in the parameter's own shape; None as well.
        axis: the contraction dimension of the parameter where it is not the usual one.
        reason: why it stays in float.
    """

    name: str
    aliases: frozenset[str]
    held: Held | None
    value: NDArray[np.float32] | None
    axis: int | None
    reason: str

    def columns(self, stored: NDArray[Any]) -> bool | None:
        """Say whether an array holds the weight as `(inputs, outputs)`; None where it does not hold it at all."""
        if self.value is None:
            return None
        turned = self.value.ndim == 2 and self.axis in (0, -2)  # the parameter itself is `(inputs, outputs)`
        if np.array_equal(stored, self.value):
            return turned
        return not turned if self.value.ndim == 2 and np.array_equal(stored.T, self.value) else None


class Use(NamedTuple):
    """One place where the graph reads a weight, transposes, splits and slices looked through.

    Attributes:
        node: the operator.
        flipped: whether it reads `(inputs, outputs)`.
        rows: the outputs that it reads; None is all.
        product: whether it is a matrix product with the weight on the right.
    """

    node: Any
    flipped: bool
    rows: tuple[int, int] | None
    product: bool


def fold_shapes(model: Any) -> None:
    """Compute what the graph says about sizes, and nothing that has a weight in it: splits and slices must keep the weight as it is."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    def on_weights(node: Any) -> bool | None:
        tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
        return False if any(len(tensor.shape) > 1 for tensor in tensors) else None

    fold_constants(model, should_fold=on_weights)
    RemoveUnusedNodesPass()(model)


def found(model: Any, weights: list[Weight]) -> Iterator[tuple[Any, Weight, Held, list[Use]]]:
    """Yield every initializer that holds an encoded weight, the weight, its codes, and where it is read."""
    for initializer in list(model.graph.initializers.values()):
        weight, flipped = _match(initializer, weights)
        if weight is not None and weight.held is not None:
            yield initializer, weight, weight.held, list(_uses(initializer, flipped, None, len(weight.held.codes)))


def places(model: Any) -> dict[str, int]:
    """Count the operators that hold codes of every parameter: the optimizer merges those with equal inputs."""
    holders = [node for node in model.graph.all_nodes() if node.op_type == nbits.OPERATOR or _dequantizes(node)]
    return dict(Counter(onnx_held.named(node.name)[0] for node in holders))


def merged(counts: Mapping[str, int], written: list[str], weights: list[Weight]) -> dict[str, int]:
    """Return the counts with those of weights whose operators became one with those of an equal weight."""
    helds = {weight.name: weight.held for weight in weights if weight.held is not None}
    whole = dict(counts)
    for name in [name for name in written if name not in counts]:
        twins = [other for other in counts if other in helds and helds[other].same(helds[name])]
        if twins:
            whole[name] = counts[twins[0]]
    return whole


def folded(model: Any, encoded: Mapping[str, Encoded], floats: Mapping[str, str]) -> dict[str, str]:
    """Return a longer reason for float weights that the optimizer merged with a neighbour, such as a batch norm."""
    longer = {}
    for name, reason in floats.items():
        value = model.graph.initializers.get(name)
        if value is not None and not np.array_equal(value.const_value.numpy(), plain(encoded[name].decode()).numpy()):
            longer[name] = f"{reason}; {onnx_held.FOLDED}"
    return longer


def constant(graph: Any, name: str, array: NDArray[Any]) -> Any:
    """Add an array to the graph's initializers."""
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _dequantizes(node: Any) -> bool:
    """Whether a node is a DequantizeLinear of a constant, which is a weight; others belong to activations."""
    return node.op_type == qdq.OPERATOR and node.inputs[0] is not None and node.inputs[0].const_value is not None


def _match(initializer: Any, weights: list[Weight]) -> tuple[Weight | None, bool]:
    """Return the weight an initializer holds, by value, and whether it is there as `(inputs, outputs)`; names break ties."""
    tensor = initializer.const_value
    if tensor is None or len(tensor.shape) < 1:
        return None, False
    shape, stored = tuple(int(size) for size in tensor.shape), None
    for weight in sorted(weights, key=lambda weight: initializer.name not in weight.aliases):
        if weight.value is not None and shape in (weight.value.shape, weight.value.shape[::-1]):
            stored = tensor.numpy() if stored is None else stored
            columns = weight.columns(stored)
            if columns is not None:
                return weight, columns
    return None, False


def _uses(value: Any, flipped: bool, rows: tuple[int, int] | None, outputs: int) -> Iterator[Use]:
    """Yield every place that reads a weight of so many outputs."""
    start, stop = rows or (0, outputs)
    for node, index in list(value.uses()):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        matrix = value.shape is not None and len(value.shape) == 2
        cut = _cut(node, index, attributes, int(flipped), stop - start) if matrix else None
        if node.op_type == "Identity":
            yield from _uses(node.outputs[0], flipped, rows, outputs)
        elif node.op_type == "Transpose" and list(attributes.get("perm", [1, 0])) == [1, 0]:
            yield from _uses(node.outputs[0], not flipped, rows, outputs)
        elif cut is not None:
            for output, (first, last) in zip(node.outputs, cut, strict=True):
                yield from _uses(output, flipped, (start + first, start + last), outputs)
        elif node.op_type == "Gemm":
            plain_sum = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
            yield Use(node, flipped, rows, index == 1 and plain_sum and bool(attributes.get("transB", 0)) != flipped)
        else:
            yield Use(node, flipped, rows, node.op_type == "MatMul" and index == 1 and flipped)


def _cut(node: Any, index: int, attributes: Mapping[str, Any], axis: int, length: int) -> list[tuple[int, int]] | None:
    """Return which outputs each result of a Split or Slice of a matrix holds; None for anything else, and for cuts along the inputs."""
    if index or node.op_type not in ("Split", "Slice"):
        return None
    constants = [None if value is None or value.const_value is None else value.const_value.numpy() for value in node.inputs[1:]]
    if node.op_type == "Split":
        sizes = constants[0].tolist() if constants and constants[0] is not None else None
        if sizes is None and length % len(node.outputs) == 0:
            sizes = [length // len(node.outputs)] * len(node.outputs)
        if sizes is None or attributes.get("axis", 0) % 2 != axis or sum(sizes) != length:
            return None
        ends = np.cumsum(sizes).tolist()
        return list(zip([0, *ends], ends, strict=False))
    if len(constants) < 3 or any(part is None or part.size != 1 for part in constants):
        return None
    first, last, along, step = (int(part.reshape(-1)[0]) for part in [*constants, np.ones(1)][:4] if part is not None)
    if along % 2 != axis or step != 1:
        return None
    first, last, _ = slice(first, last).indices(length)
    return [(first, last)] if first < last else None
