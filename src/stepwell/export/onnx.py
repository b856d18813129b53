"""ONNX: a model whose encoded weights are codes in the file, everything else in float32, in one of two forms.

`onnx` writes matrices as `com.microsoft.MatMulNBits`, which onnxruntime has fast kernels for; `onnx_qdq` writes every weight behind
`DequantizeLinear`, which any runtime reads. The graph comes from torch.export while the model holds `encoded.decode()`; weights are
replaced before the graph is optimized.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from stepwell.export import nbits, onnx_held, qdq
from stepwell.export.deployed import check_encoded, deployed, owners, plain
from stepwell.export.exported import Exported
from stepwell.export.extras import need
from stepwell.export.onnx_graph import Weight, fold_shapes, folded, merged, places
from stepwell.export.onnx_replace import with_dequantize, with_products
from stepwell.export.onnx_write import write
from stepwell.export.trace import check_example, check_sequence, open_axes, quiet, to_graph
from stepwell.quantizers import Encoded
from stepwell.runtimes import targets

Replacement = Callable[[Any, list[Weight]], tuple[list[str], dict[str, str]]]


def onnx(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    example: tuple[Tensor, ...],
    path: str | Path,
    *,
    sequence: int | None = None,
    compute: Literal["float32", "int8"] = "float32",
) -> Exported:
    """Write a model as an ONNX file in which the encoded matrices keep their codes and scales, bit for bit, in MatMulNBits.

    The first axis of the inputs stays open ("batch"). The model is left as it was, training mode included; it need not hold the grid
    weights. Codes stay what they are. What holds more than two gigabytes is written as two files, the second beside the first.

    Args:
        model: any module that torch.export can trace. A language model's cache of keys and values is switched off while it is traced.
        encoded: encoded weights by parameter name, from `run.finalize()` or `ptq.rtn(..)`. Matrices must lie on a grid that MatMulNBits
            holds (see `target("onnx:matmulnbits")`); convolution weights and embeddings are written as float32 values, with the reason.
        example: input tensors, as the model takes them; only shapes and dtypes matter.
        path: the file to write; an existing one is replaced only when the export succeeded.
        sequence: an axis of the inputs to leave open as well, for example 1 for `(batch, sequence, features)`.
        compute: "float32" tells the kernel to leave activations alone (accuracy level 1), so that it computes what the model does; "int8"
            lets it round them to 8 bits per block (accuracy level 4), which is faster, moves the outputs, and is named by `verify`.

    Returns:
        Which weights run on their codes and which are float, with the reason; the file's metadata holds the same.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        TypeError, ValueError: arguments that do not fit together, an example that the model does not take, or a matrix on a grid that the
            operator cannot hold.
        RuntimeError: the model cannot be traced.
    """
    if compute not in ("float32", "int8"):
        raise ValueError(f"`compute` must be 'float32' or 'int8': got {compute!r}.")
    accuracy = nbits.FLOAT32 if compute == "float32" else nbits.INT8
    path = _checked(model, encoded, example, path, sequence)
    weights = [_for_products(*entry) for entry in _entries(model, encoded)]
    return _export(model, encoded, example, path, sequence, weights, lambda graph, found: with_products(graph, found, accuracy), None)


def onnx_qdq(
    model: nn.Module, encoded: Mapping[str, Encoded], example: tuple[Tensor, ...], path: str | Path, *, sequence: int | None = None
) -> Exported:
    """Write a model as an ONNX file in which every encoded weight keeps its codes and scales, bit for bit, behind DequantizeLinear.

    Matrices, convolutions of any kind and embeddings alike, at 2 to 8 bits: codes of 3 bits are stored in 4, of 5 to 7 in 8; 2 bits need
    opset 25. The rest is as for `onnx`.

    onnxruntime fuses the operator and a matrix product into MatMulNBits, and then rounds activations to 8 bits unless the session option
    `session.qdq_matmulnbits_accuracy_level` is "1". `verify` sets it, and says how far the default would be off.

    Args:
        model: any module that torch.export can trace.
        encoded: encoded weights by parameter name, on integer grids with integer zero points (see `target("onnx:qdq")`).
        example: input tensors, as the model takes them; only shapes and dtypes matter.
        path: the file to write; an existing one is replaced only when the export succeeded.
        sequence: an axis of the inputs to leave open as well.

    Returns:
        Which weights are codes, and in how many places.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        TypeError, ValueError: arguments that do not fit together, an example that the model does not take, or a weight on a grid that the
            operator cannot hold.
        RuntimeError: the model cannot be traced.
    """
    path = _checked(model, encoded, example, path, sequence)
    weights = [_for_dequantize(*entry) for entry in _entries(model, encoded)]
    narrow = any(weight.held is not None and weight.held.bits == 2 for weight in weights)
    return _export(model, encoded, example, path, sequence, weights, with_dequantize, qdq.OPSET_TWO_BITS if narrow else qdq.OPSET)


def _checked(model: nn.Module, encoded: Mapping[str, Encoded], example: tuple[Tensor, ...], path: str | Path, sequence: int | None) -> Path:
    """Refuse what cannot be exported before anything is done."""
    need("onnx", "onnx_ir", "onnxscript", extra="onnx")
    path = Path(path)
    check_example(example)
    check_encoded(model, encoded)
    if not encoded:
        raise ValueError("`encoded` must hold at least one weight: got an empty mapping. Was anything selected?")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be a file: got the folder {path}. Name a file in it, such as {path / 'model.onnx'}.")
    check_sequence(example, sequence)
    return path


def _export(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    example: tuple[Tensor, ...],
    path: Path,
    sequence: int | None,
    weights: list[Weight],
    replace: Replacement,
    opset: int | None,
) -> Exported:
    """Trace, replace, optimize, describe and write."""
    with deployed(model, encoded):
        example = tuple(plain(part) for part in example)
        program = to_graph(model, example, axes=open_axes(example, sequence), opset=opset)
        with quiet():
            fold_shapes(program.model)
        written, floats = replace(program.model, weights)
        with quiet():
            program.optimize()
        counts = merged(places(program.model), written, weights)
        exported = Exported(path, counts, floats | folded(program.model, encoded, floats))
        _describe(program.model, exported, encoded)
        write(program.model, path)
    return exported


def _entries(model: nn.Module, encoded: Mapping[str, Encoded]) -> list[tuple[str, Encoded, frozenset[str], list[nn.Module]]]:
    """Return every encoded weight with all names of its parameter and the modules that own it."""
    parameters, modules = owners(model), dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, weight in encoded.items():
        aliases = frozenset(alias for alias, parameter in parameters.items() if parameter is parameters[name])
        found.append((name, weight, aliases, [modules[alias.rpartition(".")[0]] for alias in aliases]))
    return found


def _for_products(name: str, weight: Encoded, aliases: frozenset[str], users: list[nn.Module]) -> Weight:
    """Return a weight for MatMulNBits, in float where it is no matrix of a product; refuse matrices on a grid it cannot hold."""
    if weight.codes.ndim != 2:
        reason = f"{type(users[0]).__name__} weight of {weight.codes.ndim} dimensions: MatMulNBits takes matrices"
        return Weight(name, aliases, None, None, None, reason)
    if all(isinstance(user, nn.Embedding | nn.EmbeddingBag) for user in users):
        return Weight(name, aliases, None, None, None, "embedding: a lookup, no matrix product")
    _refuse(name, weight, nbits.refusal(weight), "`target('onnx:matmulnbits')` or `int8()`")
    return Weight(name, aliases, nbits.hold(weight), plain(weight.decode()).numpy(), weight.quantizer.axis, "")


def _for_dequantize(name: str, weight: Encoded, aliases: frozenset[str], users: list[nn.Module]) -> Weight:
    """Return a weight for DequantizeLinear; refuse a grid it cannot hold."""
    _refuse(name, weight, qdq.refusal(weight), "`target('onnx:qdq')`")
    return Weight(name, aliases, qdq.hold(weight), plain(weight.decode()).numpy(), weight.quantizer.axis, "")


def _refuse(name: str, weight: Encoded, reason: str | None, instead: str) -> None:
    """Refuse a grid, and say which runtimes could take it."""
    if reason is not None:
        able = [target.name for target in targets() if target.holds(weight.quantizer) and target.name != "safetensors"]
        others = f" Targets that hold it: {', '.join(able)}." if able else ""
        raise ValueError(
            f"`encoded` holds {name!r} on the grid {weight.quantizer}, which cannot be exported. {reason}. "
            f"Quantize with {instead}, or leave the weight out with `skip=[...]`.{others}"
        )


def _describe(model: Any, exported: Exported, encoded: Mapping[str, Encoded]) -> None:
    """Replace the exporter's notes, source paths among them, by what was exported."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
            value.metadata_props.clear()
    if any(node.domain == nbits.DOMAIN for node in model.graph.all_nodes()):
        model.opset_imports[nbits.DOMAIN] = 1
    grids = {name: str(encoded[name].quantizer) for name in exported.products}
    model.metadata_props[onnx_held.METADATA] = json.dumps({"version": onnx_held.VERSION, "products": grids, "floats": exported.floats})
