"""ONNX parity: what onnxruntime loaded from a file, against the model it came from."""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from stepwell.activations import ranges
from stepwell.export import nbits, onnx_file, onnx_held, qdq
from stepwell.export.certificate import Certificate, Layer
from stepwell.export.deployed import owners, plain
from stepwell.export.extras import need
from stepwell.export.onnx_causes import Subject, explain, worst
from stepwell.export.onnx_held import Held
from stepwell.export.onnx_layers import PLAIN, Kernel
from stepwell.export.onnx_write import data_files
from stepwell.export.outputs import certify, digest
from stepwell.quantizers import Encoded

CLOSE = 1e-5  # of the largest output: a kernel that is understood


def check(path: Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded]) -> Certificate:
    """Load an `.onnx` file into onnxruntime and compare weights and outputs; arguments as in `verify`, already checked.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ValueError: no ONNX file, or a model or example that does not fit it.
    """
    need("onnx", "onnxruntime", extra="onnx")
    file, session = onnx_file.read(path), onnx_file.load(path)
    example = tuple(plain(part) for part in example)
    subject = Subject(path, file, model, encoded, example, session.axes)
    runs = subject.compare(session)
    causes, kernels, noise = explain(subject, worst(runs))
    if noise is not None:  # rounded activations amplify noise, which is a cause to be named and nothing to be allowed for
        runs = [run._replace(noise=noise) for run in runs]
    layers = _against_encoded(file, model, encoded, kernels) if encoded else _against_model(file, model, kernels)
    runtime = "onnxruntime CPUExecutionProvider" + (f" with {qdq.OPTION}={nbits.FLOAT32}" if file.dequantized else "")
    certificate = certify(path, layers, runs, runtime=runtime, version=session.version, causes=causes)
    # where there is something to explain, every kernel must be what it was taken for
    figures = [layer.modelled for layer in layers if layer.modelled is not None and (layer.kernel != PLAIN or not certificate.exact)]
    understood = all(figure <= CLOSE for figure in figures)
    wrong = _other_ranges(file, model, kernels)
    layers = [replace(layer, note="; ".join(filter(None, (layer.note, wrong.get(layer.name))))) for layer in layers]
    passed = certificate.passed and understood and not wrong
    return replace(certificate, sha256=_digest(path), layers=tuple(layers), passed=passed)


def _against_encoded(
    file: onnx_file.OnnxFile, model: nn.Module, encoded: Mapping[str, Encoded], kernels: Mapping[str, Kernel]
) -> list[Layer]:
    """Compare every encoded weight with what the file holds for it, and name what else the file holds."""
    parameters, layers = owners(model), []
    claimed: set[str] = set()
    for name, weight in encoded.items():
        aliases = {alias for alias, parameter in parameters.items() if parameter is parameters[name]}
        wanted = {operator: _expected(weight, operator) for operator in (nbits.OPERATOR, qdq.OPERATOR)}
        pairs = [(product, wanted[product.operator]) for product in file.products]
        own = [(product, held) for product, held in pairs if held is not None and product.parameter in aliases]
        if not own:  # files of others have other names, and equal operators may have been merged
            own = [(product, held) for product, held in pairs if held is not None and product.held.same(held)]
        claimed.update(product.node for product, _ in own)
        layer = _layer(name, own, file.floats.get(name, "")) if own else _float_layer(name, weight, file)
        layers.append(_with_kernels(layer, [product.node for product, _ in own], kernels))
    for product in file.products:
        if product.node not in claimed:
            layers.append(Layer(product.parameter, 1, _grid(product), False, False, False, "in the file, but not in `encoded`"))
    return layers


def _with_kernels(layer: Layer, nodes: list[str], kernels: Mapping[str, Kernel]) -> Layer:
    """Add how the products of a weight were found to be computed."""
    found = [kernels[node] for node in nodes if node in kernels]
    if not found:
        return layer
    kinds = " and ".join(sorted({kernel.kind for kernel in found}))
    return replace(layer, kernel=kinds, modelled=float(np.max([kernel.error for kernel in found])))


def _other_ranges(file: onnx_file.OnnxFile, model: nn.Module, kernels: Mapping[str, Kernel]) -> dict[str, str]:
    """Return, by parameter, where the file rounds activations on another range than the model's modules do."""
    expected, found = ranges(model), {}
    for product in file.products:
        kernel, range = kernels.get(product.node), expected.get(product.parameter.rpartition(".")[0])
        if kernel is not None and kernel.range != range:
            found[product.parameter] = f"its activations are rounded on {kernel.range}, the model's on {range}"
    return found


def _digest(path: Path) -> str:
    """Return the sha256 of a file; of a file and the data files beside it, that of their sums in order."""
    parts = [path, *data_files(path)]
    return digest(path) if len(parts) == 1 else sha256("\n".join(map(digest, parts)).encode()).hexdigest()


def _expected(weight: Encoded, operator: str) -> Held | None:
    """Return what an operator should hold for a weight; None where it cannot hold it."""
    if operator == qdq.OPERATOR:
        return qdq.hold(weight) if qdq.refusal(weight) is None else None
    return nbits.hold(weight) if weight.codes.ndim == 2 and nbits.refusal(weight) is None else None


def _layer(name: str, products: list[tuple[onnx_file.Product, Held]], also: str) -> Layer:
    """Compare the operators of one weight with what they should hold."""
    notes = [also] if also else []
    codes = scales = values = True
    for product, whole in products:
        held, expected = product.held, whole if product.rows is None else whole.rows(*product.rows)
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
    return Layer(name, len(products), _grid(products[0][0]), codes, scales, values, "; ".join(notes))


def _float_layer(name: str, weight: Encoded, file: onnx_file.OnnxFile) -> Layer:
    """Compare a weight that the export lists as float; one it does not list is missing."""
    reason = file.floats.get(name)
    if reason is None:
        return Layer(name, 0, "-", False, False, False, "not in the file, and not listed as float")
    stored = file.arrays.get(name)
    equal = None if stored is None else np.array_equal(stored, plain(weight.decode()).numpy())
    if equal is False and reason.endswith(onnx_held.FOLDED):
        equal = None
    return Layer(name, 0, "float", None, None, equal, reason)


def _against_model(file: onnx_file.OnnxFile, model: nn.Module, kernels: Mapping[str, Kernel]) -> list[Layer]:
    """Compare every decoded weight of the file with the model's parameter of that name, or of that value."""
    weights = {name: plain(parameter).numpy() for name, parameter in owners(model).items() if parameter.ndim > 1}
    layers = []
    for product in file.products:
        value = product.held.decode()
        own = {product.parameter: weights[product.parameter]} if product.parameter in weights else weights
        name = next((name for name, weight in own.items() if _is(value, weight, product.rows)), None)
        note = "" if name else f"the model's {product.parameter} differs" if len(own) == 1 else "no parameter of the model has this value"
        layer = Layer(name or product.parameter, 1, _grid(product), None, None, name is not None, note)
        layers.append(_with_kernels(layer, [product.node], kernels))
    return layers


def _is(value: NDArray[np.float32], weight: NDArray[np.float32], rows: tuple[int, int] | None) -> bool:
    """Whether rows of outputs are those of a parameter, which may be stored as `(inputs, outputs)`."""
    layouts = [weight, weight.T] if weight.ndim == 2 else [weight.reshape(len(weight), -1)]
    return any(np.array_equal(value, layout if rows is None else layout[slice(*rows)]) for layout in layouts)


def _grid(product: onnx_file.Product) -> str:
    zeros = ", zero points" if product.held.stored_zeros else ""
    return f"{product.held.bits} bits, block {product.held.block}{zeros}"
