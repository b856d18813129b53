"""ONNX: a model whose encoded matrices run as `com.microsoft.MatMulNBits` in onnxruntime, everything else in float32.

The graph comes from torch.export while the model holds `encoded.decode()`; weights are replaced before the graph is optimized.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stepwell.export import nbits
from stepwell.export.deployed import check_encoded, deployed, owners, plain
from stepwell.export.exported import Exported
from stepwell.export.extras import need
from stepwell.export.onnx_graph import Weight, folded, products, replace
from stepwell.export.trace import check_example, check_sequence, open_axes, quiet, to_graph
from stepwell.quantizers import Encoded

LARGEST = 2**31 - 2**20  # bytes: protobuf holds two gigabytes, less a little for the graph itself


def onnx(
    model: nn.Module, encoded: Mapping[str, Encoded], example: tuple[Tensor, ...], path: str | Path, *, sequence: int | None = None
) -> Exported:
    """Write a model as an ONNX file in which the encoded matrices keep their codes and scales, bit for bit.

    The first axis of the inputs stays open ("batch"). The model is left as it was, training mode included; it need not hold the grid
    weights. Codes stay what they are; the kernel is told to compute in float32 (accuracy level 1).

    Args:
        model: any module that torch.export can trace.
        encoded: encoded weights by parameter name, from `run.finalize()` or `ptq.rtn(..)`. Matrices must lie on a grid that MatMulNBits
            holds (see `target("onnx:matmulnbits")`); convolution weights and embeddings are written as float32 values, with the reason.
        example: input tensors, as the model takes them; only shapes and dtypes matter.
        path: the file to write; an existing one is replaced only when the export succeeded.
        sequence: an axis of the inputs to leave open as well, for example 1 for `(batch, sequence, features)`.

    Returns:
        Which weights run on their codes and which are float, with the reason; the file's metadata holds the same.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        TypeError, ValueError: arguments that do not fit together, an example that the model does not take, or a matrix on a grid that the
            operator cannot hold.
        RuntimeError: the model cannot be traced.
    """
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
    weights = _weights(model, encoded)
    with deployed(model, encoded):
        example = tuple(plain(part) for part in example)
        program = to_graph(model, example, axes=open_axes(example, sequence))
        floats = replace(program.model, weights)
        with quiet():
            program.optimize()
        exported = Exported(path, products(program.model), floats | folded(program.model, encoded, floats))
        _describe(program.model, exported, encoded)
        _write(program.model, path)
    return exported


def _weights(model: nn.Module, encoded: Mapping[str, Encoded]) -> list[Weight]:
    """Sort encoded weights into operator and float; refuse matrices on a grid the operator cannot hold."""
    parameters, found = owners(model), []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in encoded.items():
        aliases = frozenset(alias for alias, parameter in parameters.items() if parameter is parameters[name])
        users = [modules[alias.rpartition(".")[0]] for alias in aliases]
        if weight.codes.ndim != 2:
            reason = f"{type(users[0]).__name__} weight of {weight.codes.ndim} dimensions: MatMulNBits takes matrices"
            found.append(Weight(name, aliases, None, None, reason))
        elif all(isinstance(user, nn.Embedding | nn.EmbeddingBag) for user in users):
            found.append(Weight(name, aliases, None, None, "embedding: a lookup, no matrix product"))
        elif refused := nbits.refusal(weight):
            raise ValueError(
                f"`encoded` holds {name!r} on the grid {weight.quantizer}, which cannot be exported. {refused}. "
                "Quantize with `target('onnx:matmulnbits')` or `int8()`, or leave the weight out with `skip=[...]`."
            )
        else:
            held = nbits.hold(weight)
            found.append(Weight(name, aliases, held, held.decode(), ""))
    return found


def _describe(model: Any, exported: Exported, encoded: Mapping[str, Encoded]) -> None:
    """Replace the exporter's notes, source paths among them, by what was exported."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
            value.metadata_props.clear()
    model.opset_imports[nbits.DOMAIN] = 1
    grids = {name: str(encoded[name].quantizer) for name in exported.products}
    model.metadata_props[nbits.METADATA] = json.dumps({"version": nbits.VERSION, "products": grids, "floats": exported.floats})


def _write(model: Any, path: Path) -> None:
    """Write aside, then rename: the old file or the new one, never half of either."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > LARGEST:
        raise ValueError(
            f"`path`: an ONNX file of one piece holds two gigabytes, this model takes {size:,} bytes. Encode more of its weights."
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        ir.save(model, aside, format="protobuf")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
