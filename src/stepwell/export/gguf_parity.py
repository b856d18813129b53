"""GGUF parity: what `gguf` reads and decodes from a file, against the model it came from.

llama.cpp multiplies with the same codes and scales, and rounds activations to 8 bits besides. Where llama-cpp-python is installed and the
example is tokens, the outputs are llama.cpp's; else they are those of `gguf`'s decoders in PyTorch, which leave that rounding out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepwell.activations import refuse_rounded
from stepwell.export import gguf_blocks, gguf_file, gguf_names, llama_cpp
from stepwell.export.certificate import Cause, Certificate, Layer
from stepwell.export.deployed import owners, plain
from stepwell.export.extras import need
from stepwell.export.outputs import Compared, certify, compare, with_weights
from stepwell.quantizers import Encoded

CLOSE = 1e-5  # of a product's largest output: a kernel of which the model is right
FLOATS = ("F32", "F16", "BF16", "F64")


def check(path: Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded]) -> Certificate:
    """Read a `.gguf` file and compare weights and outputs; arguments as in `verify`, already checked.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        ValueError: no GGUF file, or a model or example that does not fit it.
    """
    need("gguf", extra="export")
    refuse_rounded(model, "GGUF")
    file = gguf_file.read(path)
    first = {id(parameter): name for name, parameter in reversed(owners(model).items())}
    known = {first[id(parameter)]: parameter for parameter in owners(model).values()}
    weights = {first[id(owners(model)[name])]: (name, weight) for name, weight in encoded.items()}
    places = gguf_names.names(getattr(model, "config", None), list(known))
    loaded = {name: _loaded(stored, places, name) for name in known if (stored := file.tensors.get(places.files[name])) is not None}
    layers = [
        *_quantized(file, places, weights, known, loaded),
        *_float_part(file, places, known, loaded, quantized=set(weights)),
        *_surplus(file, set(places.files.values()) | {"rope_freqs.weight"}),
    ]
    decoded = compare(model, encoded, with_weights(model, loaded), example)
    halves = {name: known[name] for name in loaded if file.tensors[places.files[name]].type == "F16" and name not in weights}
    causes = []
    if halves:
        # the same weights as the file's, rounded here instead of read there
        rounded = with_weights(model, {**loaded, **{name: plain(tensor).half().float() for name, tensor in halves.items()}})
        modelled = compare(model, encoded, with_weights(model, loaded), example, reference=rounded)
        what = f"{len(halves)} float matrices rounded to float16 in the model too"
        causes.append(Cause("float16 storage", what, decoded[0].error, modelled[0].error))
    if llama_cpp.available() and len(example) == 1 and example[0].ndim == 2 and not example[0].is_floating_point():
        return _in_llama_cpp(path, model, example, encoded, file, places, layers, decoded, causes)
    return certify(path, layers, decoded, runtime="PyTorch with the decoders of gguf", version=version("gguf"), causes=causes)


def _in_llama_cpp(
    path: Path,
    model: nn.Module,
    example: tuple[Tensor, ...],
    encoded: Mapping[str, Encoded],
    file: gguf_file.GgufFile,
    places: gguf_names.Names,
    layers: list[Layer],
    decoded: list[Compared],
    causes: list[Cause],
) -> Certificate:
    """Run the file in llama.cpp as well, hold every kernel against what it is known to compute, and name what that accounts for."""
    errors: dict[str, float] = {}

    def runtime(inputs: tuple[Tensor, ...]) -> list[NDArray[np.float32]]:
        ran = [llama_cpp.run(path, row.tolist()) for row in inputs[0]]
        for product in (product for one in ran for product in one.products):
            one_error = llama_cpp.error(product, file.tensors[product.weight])
            errors[product.weight] = float(np.max([errors.get(product.weight, 0.0), one_error]))
        return [np.stack([one.logits for one in ran])]

    runs = compare(model, encoded, runtime, example)
    parameters = {places.files[name]: name for name in places.files}
    first = {id(parameter): name for name, parameter in reversed(owners(model).items())}
    found = {parameters[name]: error for name, error in errors.items() if name in parameters}
    rows = []
    for layer in layers:
        name = first[id(owners(model)[layer.name])] if layer.name in owners(model) else layer.name
        known = found.get(name) if layer.nodes else None
        rows.append(layer if known is None else replace(layer, kernel="activations rounded to 8 bits", modelled=known))
    worst = max((row.modelled for row in rows if row.modelled is not None), default=float("inf"))
    what = f"the file's weights decoded by gguf, products in float32; every kernel modelled to {worst:.0e} on the inputs that it got"
    cause = Cause("8-bit activations in llama.cpp's kernels", what, runs[0].error, decoded[0].error)
    certificate = certify(path, rows, runs, runtime="llama.cpp", version=version("llama-cpp-python"), causes=[cause, *causes])
    return replace(certificate, passed=certificate.passed and worst <= CLOSE)


def _loaded(stored: gguf_file.Stored, places: gguf_names.Names, name: str) -> Tensor:
    """Return a tensor of the file in the model's order of rows."""
    tensor = torch.from_numpy(np.array(gguf_file.values(stored)))
    return gguf_names.separate(tensor, places.heads[name]) if name in places.heads else tensor


def _quantized(
    file: gguf_file.GgufFile,
    places: gguf_names.Names,
    weights: Mapping[str, tuple[str, Encoded]],
    known: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
) -> Iterator[Layer]:
    """Yield a row for every encoded weight, and for every other matrix of the file that is in blocks."""
    for name, (alias, weight) in weights.items():
        stored = file.tensors.get(places.files[name])
        if stored is None:
            yield Layer(alias, 0, "-", False, False, False, "not in the file")
        elif stored.type not in gguf_blocks.KINDS:
            yield Layer(alias, 0, stored.type, False, False, bool(torch.equal(loaded[name], plain(weight.decode()))), "not in blocks")
        else:
            yield _against(alias, weight, stored, places.heads.get(name, 0), loaded[name])
    for name, stored in ((name, file.tensors[places.files[name]]) for name in loaded if name not in weights):
        if stored.type not in FLOATS:
            equal = torch.equal(loaded[name], plain(known[name]))
            note = "in the file, but not in `encoded`" if weights else "" if equal else f"the model's {name} differs"
            codes = False if weights else None
            yield Layer(name, 1, stored.type, codes, codes, equal, note)


def _against(name: str, weight: Encoded, stored: gguf_file.Stored, heads: int, loaded: Tensor) -> Layer:
    """Compare one weight with what the file holds for it, codes and scales in the model's order of rows."""
    kind = gguf_blocks.KINDS[stored.type]
    found, expected = gguf_blocks.unpack(stored.data, kind), gguf_blocks.hold(weight, kind)
    if found.codes.shape != expected.codes.shape or found.scales.shape != expected.scales.shape:
        return Layer(name, 1, stored.type, False, False, False, f"it has shape {found.codes.shape} in the file")
    codes = int((_ordered(found.codes, heads) != expected.codes).sum())
    scales = _wrong(found.scales, expected.scales, heads) + _wrong(found.minimums, expected.minimums, heads)
    notes = [f"{codes} of {found.codes.size} codes differ"] * bool(codes) + [f"{scales} of {found.scales.size} scales differ"] * bool(
        scales
    )
    equal = torch.equal(loaded, plain(weight.decode()))
    dtype = "e8m0" if stored.type == "MXFP4" else "float16"
    return Layer(name, 1, f"{stored.type}, {dtype} scales", not codes, not scales, equal, "; ".join(notes))


def _ordered(rows: NDArray[np.int16], heads: int) -> NDArray[np.int16]:
    ordered: NDArray[np.int16] = gguf_names.separate(torch.from_numpy(rows), heads).numpy() if heads else rows
    return ordered


def _wrong(found: NDArray[np.float32] | None, expected: NDArray[np.float32] | None, heads: int) -> int:
    """Count scales that differ in any bit."""
    if found is None or expected is None:
        return 0 if found is expected else 1
    rows = gguf_names.separate(torch.from_numpy(found), heads).numpy() if heads else found
    return int((rows.view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)).sum())


def _float_part(
    file: gguf_file.GgufFile, places: gguf_names.Names, known: Mapping[str, Tensor], loaded: Mapping[str, Tensor], *, quantized: set[str]
) -> Iterator[Layer]:
    """Yield one row for all that is in float on both sides."""
    names = [name for name in known if name not in quantized and (name not in loaded or file.tensors[places.files[name]].type in FLOATS)]
    missing = [name for name in names if name not in loaded]
    wrong = [
        name
        for name in names
        if name in loaded and not torch.equal(loaded[name], _stored_as(plain(known[name]), file.tensors[places.files[name]].type))
    ]
    types = sorted({file.tensors[places.files[name]].type for name in names if name in loaded})
    notes = [f"{name} is not in the file" for name in missing[:1]] + [f"{name} differs" for name in wrong[:1]]
    if names:
        yield Layer(f"float part, {len(names)} tensors", 0, ", ".join(types), None, None, not missing and not wrong, "; ".join(notes))


def _stored_as(tensor: Tensor, type: str) -> Tensor:
    """Return a float tensor as the file's dtype holds it."""
    return tensor.to({"F16": torch.float16, "BF16": torch.bfloat16}.get(type, torch.float32)).float()


def _surplus(file: gguf_file.GgufFile, expected: set[str]) -> Iterable[Layer]:
    """Yield a row for every tensor that no parameter of the model stands for."""
    surplus = [(name, stored) for name, stored in file.tensors.items() if name not in expected]
    return [Layer(name, 0, stored.type, None, None, False, "no parameter of the model") for name, stored in surplus]
