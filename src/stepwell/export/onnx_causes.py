"""Causes: why an ONNX file's outputs differ from the model's, each one switched off to see what it accounts for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from stepwell.activations import without_rounding
from stepwell.export import nbits, onnx_file, qdq
from stepwell.export.certificate import Cause
from stepwell.export.onnx_layers import BIAS, DYNAMIC, INT8, STATIC, Kernel, kernels, per_token_source, save
from stepwell.export.outputs import Compared, compare
from stepwell.quantizers import Encoded


class Subject(NamedTuple):
    """What is checked: a file, what was read from it, and what it is compared with.

    Attributes:
        path, file: the file, and what was read from it.
        model, encoded: as in `verify`.
        example: as in `verify`, in float32.
        axes: open axes of the inputs.
    """

    path: Path
    file: onnx_file.OnnxFile
    model: nn.Module
    encoded: Mapping[str, Encoded]
    example: tuple[Tensor, ...]
    axes: Sequence[Mapping[int, str]]

    def compare(self, session: onnx_file.Session) -> list[Compared]:
        """Compare a session with the model."""
        return compare(self.model, self.encoded, session.run, self.example, axes=self.axes)


class Explanation(NamedTuple):
    """What was found out about a difference.

    Attributes:
        causes: in the order in which they were switched off.
        kernels: for every node that holds codes, how its product is computed.
        noise: what float32 arithmetic moves outputs by where no activation is rounded, in the unit of errors; None where none is.
    """

    causes: list[Cause]
    kernels: dict[str, Kernel]
    noise: float | None


def explain(subject: Subject, error: float) -> Explanation:
    """Switch the known causes of differences off, one after another.

    Args:
        subject: what is checked.
        error: the largest relative difference, with the settings of `onnx_file.load`.
    """
    path, file = subject.path, subject.file
    causes, found = [], kernels(path, file, subject.example)
    if file.dequantized:
        default = kernels(path, file, subject.example, float32=False)
        if any(kernel.kind.startswith(INT8) for kernel in default.values()):
            before = worst(subject.compare(onnx_file.load(path, float32=False)))
            name, what = _words(default, "onnxruntime's default where it fuses them", f"session option {qdq.OPTION}=1, as here")
            causes.append(Cause(name, what, before, error))
    if any(product.accuracy == nbits.INT8 for product in file.products):
        with TemporaryDirectory() as folder:
            after = worst(subject.compare(onnx_file.load(_exact(path, Path(folder)))))
        name, what = _words(found, "which the file asks for (accuracy level 4)", "accuracy level 1 in a copy of the file")
        causes.append(Cause(name, what, error, after))
    rounded = [kernel for kernel in found.values() if kernel.kind.startswith((STATIC, DYNAMIC))]
    if not rounded:
        return Explanation(causes, found, None)
    integer = sum(kernel.kind.endswith(BIAS) for kernel in rounded)
    if integer:
        before, error = causes[-1].after if causes else error, worst(subject.compare(onnx_file.load(path, biases=False)))
        name = f"biases of {integer} products on 8-bit activations that onnxruntime rounds to int32, to steps of both scales multiplied"
        causes.append(Cause(name, f"its optimizer {onnx_file.BIASES} disabled", before, error))
    with TemporaryDirectory() as folder, without_rounding(subject.model):
        bare = subject.compare(onnx_file.load(_bare(path, Path(folder))))
    name = f"{len(rounded)} of {len(found)} products on 8-bit activations, where float32 noise decides what lies on a tie"
    what = f"activations left in float32 in a copy of the file and in the model; each kernel modelled to {_most(rounded):.0e}"
    causes.append(Cause(name, what, causes[-1].after if causes else error, worst(bare)))
    return Explanation(causes, found, float(np.max([run.noise for run in bare])))


def worst(runs: Sequence[Compared]) -> float:
    """Return the largest error of several runs; NaN wins."""
    return float(np.max([run.error for run in runs]))


def _words(found: Mapping[str, Kernel], why: str, how: str) -> tuple[str, str]:
    """Return a cause's name and what was done about it, with how well the rounding kernels are understood."""
    rounding = [kernel for kernel in found.values() if kernel.kind.startswith(INT8)]
    modelled = f"; each kernel modelled to {_most(rounding):.0e}" if rounding else "; no kernel was seen to do so on this machine"
    return f"int8 activations in {len(rounding)} of {len(found)} products, {why}", f"{how}{modelled}"


def _most(kernels: Sequence[Kernel]) -> float:
    """Return the largest error of several kernels; NaN wins."""
    return float(np.max([kernel.error for kernel in kernels]))


def _exact(path: Path, folder: Path) -> Path:
    """Return a copy of a file whose products compute in float32."""
    import onnx

    model = onnx.load(str(path))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == nbits.OPERATOR and attribute.name == "accuracy_level":
                attribute.i = nbits.FLOAT32
    return save(model, folder / "exact.onnx")


def _bare(path: Path, folder: Path) -> Path:
    """Return a copy of a file in which activations are not rounded: what reads their grid values reads what went in."""
    import onnx

    model = onnx.load(str(path))
    makers = {name: node for node in model.graph.node for name in node.output}
    inner = {node.output[0]: makers.get(node.input[0]) for node in model.graph.node if node.op_type == qdq.OPERATOR}
    before = {name: node.input[0] for name, node in inner.items() if node is not None and node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = before.get(name) or per_token_source(name, makers) or name
    return save(model, folder / "bare.onnx")
