"""Replace: what becomes of an encoded weight at every place where a graph reads it, in the two forms that a file can have."""

from typing import Any

import numpy as np

from stepwell.export import nbits, onnx_held, qdq
from stepwell.export.onnx_graph import Use, Weight, constant, found
from stepwell.export.onnx_held import Held

UNUSED = "not used by the traced forward pass"


def with_products(model: Any, weights: list[Weight], accuracy: int) -> tuple[list[str], dict[str, str]]:
    """Turn products with encoded matrices into MatMulNBits; return which were, and the reasons of what stays float."""
    counts: dict[str, int] = {}
    others: dict[str, set[str]] = {weight.name: set() for weight in weights if weight.held is not None}
    constants: dict[tuple[str, tuple[int, int] | None], list[Any]] = {}
    for _, weight, held, uses in found(model, weights):
        for use in uses:
            if not use.product:
                others[weight.name].add(use.node.op_type)
                continue
            part, key = _rows(held, use), (weight.name, use.rows)
            counts[weight.name] = counts.get(weight.name, 0) + 1
            name = onnx_held.name(weight.name, use.rows, counts[weight.name])
            if key not in constants:
                stem = name.rpartition(onnx_held.COUNTER)[0]
                constants[key] = [constant(model.graph, f"{stem}.{role}", array) for role, array in nbits.to_inputs(part).items()]
            _product(use.node, part, constants[key], name, accuracy)
    floats = {weight.name: weight.reason for weight in weights if weight.held is None}
    for name, operators in others.items():
        if operators:
            also = "also " if name in counts else ""
            floats[name] = f"{also}read by {', '.join(sorted(operators))}, which is no product that MatMulNBits replaces"
        elif name not in counts:
            floats[name] = UNUSED
    return list(counts), floats


def with_dequantize(model: Any, weights: list[Weight]) -> tuple[list[str], dict[str, str]]:
    """Put DequantizeLinear in the place of every encoded weight; return which were, and the reasons of what stays float.

    Products read `(inputs, outputs)` straight from the operator, which is what onnxruntime has kernels for.
    """
    counts: dict[str, int] = {}

    def name(weight: Weight, rows: tuple[int, int] | None) -> str:
        counts[weight.name] = counts.get(weight.name, 0) + 1
        return onnx_held.name(weight.name, rows, counts[weight.name])

    for initializer, weight, held, uses in found(model, weights):
        made: dict[tuple[tuple[int, int] | None, bool], Any] = {}
        for use in uses:
            if not use.product:
                continue
            key = use.rows, _breaks(use.node, _rows(held, use))
            if key not in made:
                made[key] = _for_product(model.graph, _rows(held, use), name(weight, use.rows), upright=key[1])
            use.node.replace_input_with(1, made[key])
            use.node.attributes.pop("transB", None)
        others = [use for use in uses if not use.product]
        if others:
            value = _in_place(model.graph, weight, held, name(weight, None), columns=bool(weight.columns(initializer.const_value.numpy())))
            for node, index in list(initializer.uses()):
                node.replace_input_with(index, value)
    model.graph.sort()
    floats = {weight.name: weight.reason for weight in weights if weight.held is None}
    floats |= {weight.name: UNUSED for weight in weights if weight.held is not None and weight.name not in counts}
    return list(counts), floats


def _rows(held: Held, use: Use) -> Held:
    """Return the outputs that a use reads."""
    return held if use.rows is None else held.rows(*use.rows)


def _breaks(node: Any, held: Held) -> bool:
    """Whether onnxruntime 1.31 would make a wrong kernel of a product with a weight that is stored as `(inputs, outputs)`.

    It takes wrong codes where rows of 2-bit codes do not fill bytes, and stops where 8-bit activations meet blocks of 8-bit weights.
    """
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    activations = node.op_type == "MatMul" and producer is not None and producer.op_type == qdq.OPERATOR
    return (held.bits == 2 and len(held.codes) % 4 != 0) or (held.bits == 8 and held.scales.shape[1] > 1 and activations)


def _product(node: Any, held: Held, constants: list[Any], name: str, accuracy: int) -> None:
    """Put MatMulNBits, and an addition where there is a bias, in the place of a product."""
    import onnx_ir as ir

    outputs, inputs = held.codes.shape
    fields = {"K": inputs, "N": outputs, "bits": held.bits, "block_size": held.block, "accuracy_level": accuracy}
    new = [ir.node(nbits.OPERATOR, [node.inputs[0], *constants], fields, domain=nbits.DOMAIN, name=name)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new[0].outputs[0].name = f"{name}.product"
        new.append(ir.node("Add", [new[0].outputs[0], node.inputs[2]], name=f"{name}.bias"))
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)


def _for_product(graph: Any, held: Held, name: str, *, upright: bool) -> Any:
    """Return a dequantized weight as products read it, `(inputs, outputs)`; upright is stored as `(outputs, inputs)` and transposed."""
    value = _dequantized(graph, qdq.to_parts(held, flipped=not upright, blocks=upright), name)
    return _add(graph, "Transpose", [value], {"perm": [1, 0]}, name) if upright else value


def _in_place(graph: Any, weight: Weight, held: Held, name: str, *, columns: bool) -> Any:
    """Return a dequantized weight in the layout that the graph has it in; columns is `(inputs, outputs)`."""
    assert weight.value is not None
    shape, axis = weight.value.shape, weight.axis
    parts = qdq.to_parts(held, flipped=columns)
    if len(shape) == 2:
        return _dequantized(graph, parts, name)
    if len(shape) > 2 and axis is None and not parts.block:
        return _dequantized(graph, parts._replace(codes=parts.codes.reshape(shape)), name)
    last = len(shape) - 1 if axis is None else axis % len(shape)
    order = list(range(len(shape))) if axis is None else [*(dim for dim in range(len(shape)) if dim != last), last]
    size = constant(graph, f"{name}.shape", np.array([shape[dim] for dim in order], np.int64))
    value = _add(graph, "Reshape", [_dequantized(graph, parts, name), size], {}, name)
    return value if axis is None else _add(graph, "Transpose", [value], {"perm": np.argsort(order).tolist()}, name)


def _dequantized(graph: Any, parts: qdq.Parts, name: str) -> Any:
    """Add DequantizeLinear of a weight and return its output."""
    roles = {"codes": parts.codes, "scales": parts.scales, "zero_points": parts.zeros}
    inputs = [constant(graph, f"{name}.{role}", array) for role, array in roles.items() if array is not None]
    return _add(graph, qdq.OPERATOR, inputs, {"axis": parts.axis} | ({"block_size": parts.block} if parts.block else {}), name)


def _add(graph: Any, operator: str, inputs: list[Any], fields: dict[str, Any], name: str) -> Any:
    """Add a node of one output to the graph's end, to be sorted later, and return the output."""
    import onnx_ir as ir

    node = ir.node(operator, inputs, fields, name=name if operator == qdq.OPERATOR else f"{name}.{operator.lower()}")
    node.outputs[0].name = f"{node.name}.value"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    return node.outputs[0]
