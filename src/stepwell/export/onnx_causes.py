"""Causes: why an ONNX file's outputs differ from the model's, each one switched off to see what it accounts for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from stepwell.export import nbits, onnx_file, qdq
from stepwell.export.certificate import Cause
from stepwell.export.onnx_layers import INT8, Kernel, kernels
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


def explain(subject: Subject, error: float) -> tuple[list[Cause], dict[str, Kernel]]:
    """Switch the known causes of differences off, one after another.

    Args:
        subject: what is checked.
        error: the largest relative difference, with the settings of `onnx_file.load`.

    Returns:
        The causes, and for every node that holds codes how its product is computed.
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
    return causes, found


def worst(runs: Sequence[Compared]) -> float:
    """Return the largest error of several runs; NaN wins."""
    return float(np.max([run.error for run in runs]))


def _words(found: Mapping[str, Kernel], why: str, how: str) -> tuple[str, str]:
    """Return a cause's name and what was done about it, with how well the rounding kernels are understood."""
    rounding = [kernel.error for kernel in found.values() if kernel.kind.startswith(INT8)]
    modelled = f"; each kernel modelled to {max(rounding):.0e}" if rounding else "; no kernel was seen to do so on this machine"
    return f"int8 activations in {len(rounding)} of {len(found)} products, {why}", f"{how}{modelled}"


def _exact(path: Path, folder: Path) -> Path:
    """Return a copy of a file whose products compute in float32."""
    import onnx

    model, copy = onnx.load(str(path)), folder / "exact.onnx"
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == nbits.OPERATOR and attribute.name == "accuracy_level":
                attribute.i = nbits.FLOAT32
    onnx.save(model, str(copy), save_as_external_data=model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF)
    return copy
