"""Graph edits: products with encoded matrices become MatMulNBits operators.

Weights are found by value, among initializers that the exporter may have renamed or transposed; names only decide between equal values.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepwell.export import nbits
from stepwell.export.deployed import plain
from stepwell.quantizers import Encoded


class Weight(NamedTuple):
    """An encoded weight on its way into the graph.

    Attributes:
        name: what `encoded` calls it.
        aliases: all names of the parameter.
        held: its operator form, or None.
        value: what the traced model holds, `(outputs, inputs)`; None without operator form.
        reason: why it has none.
    """

    name: str
    aliases: frozenset[str]
    held: nbits.Held | None
    value: NDArray[np.float32] | None
    reason: str


def replace(model: Any, weights: list[Weight]) -> dict[str, str]:
    """Turn products with encoded matrices into operators; return the reasons of what stays float."""
    counts: dict[str, int] = {}
    floats = {weight.name: weight.reason for weight in weights if weight.held is None}
    others: dict[str, set[str]] = {weight.name: set() for weight in weights if weight.held is not None}
    constants: dict[str, list[Any]] = {}
    for initializer in list(model.graph.initializers.values()):
        weight, flipped = _match(initializer, weights)
        if weight is None or weight.held is None:
            continue
        for node, replaceable in list(_uses(initializer, flipped)):
            if not replaceable:
                others[weight.name].add(node.op_type)
                continue
            if weight.name not in constants:
                constants[weight.name] = _constants(model.graph, weight.name, weight.held)
            counts[weight.name] = counts.get(weight.name, 0) + 1
            _substitute(node, weight.held, constants[weight.name], f"{weight.name}{nbits.COUNTER}{counts[weight.name]}")
    for name, operators in others.items():
        if operators:
            also = "also " if name in counts else ""
            floats[name] = f"{also}read by {', '.join(sorted(operators))}, which is no product that MatMulNBits replaces"
        elif name not in counts:
            floats[name] = "not used by the traced forward pass"
    return floats


def products(model: Any) -> dict[str, int]:
    """Count the operators of every parameter: the optimizer merges those with equal inputs."""
    return dict(Counter(nbits.parameter(node.name) for node in model.graph.all_nodes() if node.op_type == nbits.OPERATOR))


def folded(model: Any, encoded: Mapping[str, Encoded], floats: Mapping[str, str]) -> dict[str, str]:
    """Return a longer reason for float weights that the optimizer merged with a neighbour, such as a batch norm."""
    longer = {}
    for name, reason in floats.items():
        value = model.graph.initializers.get(name)
        if value is not None and not np.array_equal(value.const_value.numpy(), plain(encoded[name].decode()).numpy()):
            longer[name] = f"{reason}; {nbits.FOLDED}"
    return longer


def _match(initializer: Any, weights: list[Weight]) -> tuple[Weight | None, bool]:
    """Return the weight an initializer holds, by value, and whether it holds it as `(inputs, outputs)`; names break ties."""
    tensor = initializer.const_value
    if tensor is None or len(tensor.shape) != 2:
        return None, False
    shape, stored = tuple(int(size) for size in tensor.shape), None
    for weight in sorted(weights, key=lambda weight: initializer.name not in weight.aliases):
        if weight.value is None or shape not in (weight.value.shape, weight.value.shape[::-1]):
            continue
        stored = tensor.numpy() if stored is None else stored
        if np.array_equal(stored, weight.value):
            return weight, False
        if np.array_equal(stored.T, weight.value):
            return weight, True
    return None, False


def _uses(value: Any, flipped: bool) -> Iterator[tuple[Any, bool]]:
    """Yield every node that reads a matrix, transposes looked through, and whether it is a product the operator can replace."""
    for node, index in list(value.uses()):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "Transpose" and list(attributes.get("perm", [1, 0])) == [1, 0]:
            yield from _uses(node.outputs[0], not flipped)
        elif node.op_type == "Gemm":
            plain_sum = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
            yield node, index == 1 and plain_sum and bool(attributes.get("transB", 0)) != flipped
        else:
            yield node, node.op_type == "MatMul" and index == 1 and flipped


def _constants(graph: Any, name: str, held: nbits.Held) -> list[Any]:
    """Add the operator's constant inputs to the graph, named after the parameter."""
    import onnx_ir as ir

    values = []
    for role, array in nbits.to_inputs(held).items():
        tensor = ir.tensor(np.ascontiguousarray(array), name=f"{name}.{role}")
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        values.append(value)
    return values


def _substitute(node: Any, held: nbits.Held, constants: list[Any], name: str) -> None:
    """Put the operator, and an addition where there is a bias, in the place of a product."""
    import onnx_ir as ir

    outputs, inputs = held.codes.shape
    fields = {"K": inputs, "N": outputs, "bits": held.bits, "block_size": held.block, "accuracy_level": nbits.FLOAT32_COMPUTE}
    new = [ir.node(nbits.OPERATOR, [node.inputs[0], *constants], fields, domain=nbits.DOMAIN, name=name)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new[0].outputs[0].name = f"{name}.product"
        new.append(ir.node("Add", [new[0].outputs[0], node.inputs[2]], name=f"{name}.bias"))
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)
