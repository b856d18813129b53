"""Parity: is what was trained what runs? Compares what a runtime loaded with the model it came from."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepwell.export import nbits, onnx_file
from stepwell.export.certificate import Certificate, Layer
from stepwell.export.deployed import check_encoded, deployed, owners, plain
from stepwell.export.extras import need
from stepwell.export.noise import SinglyRounded
from stepwell.export.trace import check_example, compute, sizes
from stepwell.quantizers import Encoded

FLOOR, FACTOR = 2e-6, 4.0  # of the tolerance: see Certificate


def verify(path: str | Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded] | None = None) -> Certificate:
    """Load an exported file as a user would, and compare weights and outputs with the model it came from.

    Codes and scales are read back from the file. The outputs are compared on the example, on other batch sizes and on other lengths of
    every further axis that the file leaves open. The model is left as it was; it need not hold the grid weights.

    Args:
        path: an `.onnx` file.
        model: the module that was exported.
        example: real inputs, best a batch of held-out data.
        encoded: the weights that were exported, by parameter name. Without them the model itself must hold the grid weights: values are
            then compared, codes and scales cannot be.

    Returns:
        The certificate; `print` shows a table. A difference does not raise: look at `passed`.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        FileNotFoundError, TypeError, ValueError: no such file, no ONNX file, or arguments that do not fit it.
    """
    need("onnx", "onnxruntime", extra="onnx")
    check_example(example)
    check_encoded(model, {} if encoded is None else encoded)
    if Path(path).suffix != ".onnx":
        raise ValueError(f"`path` must be an .onnx file: got {path}. Other targets are not verified yet.")
    file, session = onnx_file.read(path), onnx_file.load(path)
    layers = tuple(_against_encoded(file, model, encoded) if encoded else _against_model(file, model))
    example = tuple(plain(part) for part in example)
    with deployed(model, encoded or {}), torch.no_grad():
        runs = [_run(model, session, inputs) for inputs in _inputs(example, session.axes)]
    tolerance = max(FLOOR, FACTOR * float(np.max([run.noise for run in runs])))
    error = float(np.max([run.error for run in runs]))  # np.max, because NaN must win
    equal = [_all(getattr(layer, part) for layer in layers) for part in ("codes_equal", "scales_equal", "values_equal")]
    kl, top1 = _classes(runs)
    return Certificate(
        path=str(path),
        sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        runtime="onnxruntime CPUExecutionProvider",
        version=session.version,
        codes_equal=equal[0],
        scales_equal=equal[1],
        values_equal=equal[2],
        max_relative_error=error,
        tolerance=tolerance,
        noise=float(np.max([run.noise for run in runs])),
        kl=kl,
        top1_agreement=top1,
        inputs=tuple(run.shapes for run in runs),
        layers=layers,
        passed=bool(layers) and False not in equal and error <= tolerance,  # a file without quantized weights proves nothing
    )


class _Run(NamedTuple):
    """One set of inputs: the first floating-point output of model and runtime, and how far all of them are apart."""

    shapes: str
    expected: NDArray[Any]
    found: NDArray[Any]
    error: float
    noise: float


def _run(model: nn.Module, session: onnx_file.Session, inputs: tuple[Tensor, ...]) -> _Run:
    """Run model and runtime on the same inputs."""

    def outputs() -> list[NDArray[Any]]:
        return _floating([leaf.detach().cpu().numpy() for leaf in tree_leaves(compute(model, inputs)) if isinstance(leaf, Tensor)])

    expected, found = outputs(), _floating(session.run(inputs))
    with SinglyRounded():  # type: ignore[no-untyped-call]
        exact = outputs()
    if not expected or [part.shape for part in expected] != [part.shape for part in found]:
        raise ValueError(
            f"`path` and `model` must have the same floating-point outputs: the file's have shapes {[part.shape for part in found]}, "
            f"the model's {[part.shape for part in expected]}. Was the file exported from this model?"
        )
    return _Run(sizes(inputs), expected[0], found[0], _distance(expected, found), _distance(expected, exact))


def _inputs(example: tuple[Tensor, ...], axes: Sequence[dict[int, str]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the example, and once it has run, the example with one open axis at a time cut or repeated to another length."""
    yield example
    lengths = {name: part.shape[axis] for part, opened in zip(example, axes, strict=False) for axis, name in opened.items()}
    batch = axes[0].get(0) if axes else None
    plans: list[dict[str, int]] = []
    for name, length in lengths.items():
        others = (1, length + 1) if name == batch else (max(2, length // 2) if length > 2 else length + 2,)
        plans += [{name: other} for other in others if other != length]
    for plan in plans:
        changes = [{axis: plan[name] for axis, name in opened.items() if name in plan} for opened in axes]
        yield tuple(_resize(part, change) for part, change in zip(example, changes, strict=False))


def _resize(part: Tensor, lengths: dict[int, int]) -> Tensor:
    """Cut or repeat a tensor along axes; the last element comes first, so that the rows are not merely the same ones again."""
    for axis, length in lengths.items():
        part = part.index_select(axis, (part.shape[axis] - 1 + torch.arange(length)) % part.shape[axis])
    return part


def _floating(outputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    return [part.astype(np.float64) for part in outputs if np.issubdtype(part.dtype, np.floating) and part.size]


def _distance(expected: list[NDArray[Any]], found: list[NDArray[Any]]) -> float:
    """Return the largest difference of any output, relative to the largest finite magnitude of that output."""
    worst = []
    for one, two in zip(expected, found, strict=True):
        with np.errstate(invalid="ignore"):
            difference = np.max(np.where(one == two, 0.0, np.abs(one - two)))  # equal infinities are equal
        largest = np.max(np.abs(one), where=np.isfinite(one), initial=0.0)
        worst.append(difference / largest if largest else difference)
    return float(np.max(worst))


def _classes(runs: list[_Run]) -> tuple[float | None, float | None]:
    """Return KL divergence in nats per row and top-1 agreement, over all runs; None where the output has no classes."""
    if runs[0].expected.ndim < 2 or runs[0].expected.shape[-1] < 2:
        return None, None
    pairs = [(run.expected.reshape(-1, run.expected.shape[-1]), run.found.reshape(-1, run.found.shape[-1])) for run in runs]
    expected, found = (torch.from_numpy(np.concatenate(side)).log_softmax(-1) for side in zip(*pairs, strict=True))
    kl = torch.where(expected == -torch.inf, 0.0, expected.exp() * (expected - found)).sum(-1).mean()
    return max(float(kl), 0.0), float((expected.argmax(-1) == found.argmax(-1)).double().mean())


def _against_encoded(file: onnx_file.OnnxFile, model: nn.Module, encoded: Mapping[str, Encoded]) -> list[Layer]:
    """Compare every encoded weight with what the file holds for it, and name what else the file holds."""
    parameters, layers = owners(model), []
    claimed: set[str] = set()
    for name, weight in encoded.items():
        aliases = {alias for alias, parameter in parameters.items() if parameter is parameters[name]}
        expected = nbits.hold(weight) if weight.codes.ndim == 2 and nbits.refusal(weight) is None else None
        products = [product for product in file.products if product.parameter in aliases]
        if not products and expected is not None:  # files of others have other names, and equal operators may have been merged
            products = [product for product in file.products if _same(product.held, expected)]
        claimed.update(product.node for product in products)
        if products and expected is not None:
            layers.append(_layer(name, products, expected, file.floats.get(name, "")))
        else:
            layers.append(_float_layer(name, weight, file))
    for product in file.products:
        if product.node not in claimed:
            layers.append(Layer(product.parameter, 1, _grid(product), False, False, False, "in the file, but not in `encoded`"))
    return layers


def _layer(name: str, products: list[onnx_file.Product], expected: nbits.Held, also: str) -> Layer:
    """Compare the operators of one weight with what they should hold."""
    notes = [also] if also else []
    codes = scales = values = True
    for product in products:
        held = product.held
        if held.codes.shape != expected.codes.shape or held.scales.shape != expected.scales.shape or held.bits != expected.bits:
            codes = scales = values = False
            notes.append(f"{product.node} has shape {held.codes.shape}, {held.bits} bits, block {held.block}")
            continue
        wrong_codes = int((held.codes != expected.codes).sum()) + int((held.zeros != expected.zeros).sum())
        wrong_scales = int((held.scales.view(np.uint32) != expected.scales.view(np.uint32)).sum())
        codes, scales = codes and not wrong_codes, scales and not wrong_scales
        values = values and np.array_equal(held.decode(), expected.decode())
        if wrong_codes:
            notes.append(f"{wrong_codes} of {held.codes.size} codes differ")
        if wrong_scales:
            notes.append(f"{wrong_scales} of {held.scales.size} scales differ")
    return Layer(name, len(products), _grid(products[0]), codes, scales, values, "; ".join(notes))


def _float_layer(name: str, weight: Encoded, file: onnx_file.OnnxFile) -> Layer:
    """Compare a weight that the export lists as float; one it does not list is missing."""
    reason = file.floats.get(name)
    if reason is None:
        return Layer(name, 0, "-", False, False, False, "not in the file, and not listed as float")
    stored = file.arrays.get(name)
    equal = None if stored is None else np.array_equal(stored, plain(weight.decode()).numpy())
    if equal is False and reason.endswith(nbits.FOLDED):
        equal = None
    return Layer(name, 0, "float", None, None, equal, reason)


def _against_model(file: onnx_file.OnnxFile, model: nn.Module) -> list[Layer]:
    """Compare every decoded matrix of the file with the model's parameter of that name, or of that value."""
    matrices = {name: plain(parameter).numpy() for name, parameter in owners(model).items() if parameter.ndim == 2}
    layers = []
    for product in file.products:
        value = product.held.decode()
        own = {product.parameter: matrices[product.parameter]} if product.parameter in matrices else matrices
        name = next((name for name, matrix in own.items() if np.array_equal(matrix, value) or np.array_equal(matrix.T, value)), None)
        note = "" if name else f"the model's {product.parameter} differs" if len(own) == 1 else "no parameter of the model has this value"
        layers.append(Layer(name or product.parameter, 1, _grid(product), None, None, name is not None, note))
    return layers


def _same(one: nbits.Held, two: nbits.Held) -> bool:
    parts = ((one.codes, two.codes), (one.scales, two.scales), (one.zeros, two.zeros))
    return one.bits == two.bits and all(np.array_equal(a, b) for a, b in parts)


def _grid(product: onnx_file.Product) -> str:
    zeros = ", zero points" if product.held.stored_zeros else ""
    return f"{product.held.bits} bits, block {product.held.block}{zeros}"


def _all(flags: Any) -> bool | None:
    """Return whether all known flags are true; None where none is known."""
    known = [flag for flag in flags if flag is not None]
    return all(known) if known else None
