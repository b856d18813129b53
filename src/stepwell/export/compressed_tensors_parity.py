"""compressed-tensors parity: what transformers loaded and decompressed from a folder, against the model it came from."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.export import compressed_tensors_scheme as schemes
from stepwell.export.certificate import Certificate, Layer
from stepwell.export.deployed import owners, plain
from stepwell.export.extras import need
from stepwell.export.hf_folder import check_model, load_folder, quiet_loading, read_floats
from stepwell.export.hf_parity import float_part, narrow_cause, running
from stepwell.export.outputs import certify, compare
from stepwell.quantizers import Encoded

Stored = dict[str, Tensor]


def check(path: Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded]) -> Certificate:
    """Load a folder of compressed-tensors with transformers and compare weights and outputs; arguments as in `verify`, already checked.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        ValueError: a folder that transformers does not load, or a model or example that does not fit it.
    """
    need("compressed_tensors", "transformers", extra="export")
    check_model(model, "compressed-tensors")
    loaded = load_folder(model, path)
    stored = {name: _own(module) for name, module in loaded.named_modules() if getattr(module, "quantization_scheme", None) is not None}
    dtypes = {name: tensor["weight_scale"].dtype for name, tensor in stored.items() if "weight_scale" in tensor}
    run = running(loaded)
    with quiet_loading():  # the first forward pass decompresses the weights
        runs = compare(model, encoded, run, example)
    floats = read_floats(path)
    coded = {f"{module}.weight" for module in stored}
    layers = [*_layers(model, loaded, encoded, stored, dtypes, floats), *float_part(model, loaded, encoded, floats, coded=coded)]
    causes = narrow_cause(model, encoded, run, example, runs, loaded.dtype)  # type: ignore[arg-type]
    release = f"{version('transformers')} with compressed-tensors {version('compressed-tensors')}"
    return certify(path, layers, runs, runtime="transformers", version=release, causes=causes)


def _own(module: nn.Module) -> Stored:
    """Return a module's tensors as they were loaded."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.detach().clone() for name, tensor in named if name.startswith("weight")}


def _layers(
    model: nn.Module,
    loaded: nn.Module,
    encoded: Mapping[str, Encoded],
    stored: Mapping[str, Stored],
    dtypes: Mapping[str, torch.dtype],
    floats: Mapping[str, str],
) -> Iterator[Layer]:
    """Yield a row for every encoded weight that should be in codes, and for every other one that is."""
    mine, modules = owners(model), dict(loaded.named_modules())
    claimed = set()
    for name, weight in encoded.items():
        if name in floats:
            continue
        aliases = [alias for alias, parameter in mine.items() if parameter is mine[name]]
        module = next((alias.rpartition(".")[0] for alias in aliases if alias.rpartition(".")[0] in stored), None)
        if module is None:
            yield Layer(name, 0, "-", False, False, False, "not in codes in the folder, and not listed as float")
            continue
        claimed.add(module)
        yield _against(name, weight, stored[module], modules[module], dtypes.get(module))
    for module in stored:
        if module not in claimed:
            value, own = plain(modules[module].get_parameter("weight")), mine.get(f"{module}.weight")
            equal = own is not None and torch.equal(value, plain(own).to(modules[module].get_parameter("weight").dtype).float())
            note = "in the folder, but not in `encoded`" if encoded else "" if equal else f"the model's {module}.weight differs"
            codes = False if encoded else None
            yield Layer(f"{module}.weight", 1, _grid(stored[module], modules[module], dtypes.get(module)), codes, codes, equal, note)


def _against(name: str, weight: Encoded, stored: Stored, module: nn.Module, dtype: torch.dtype | None) -> Layer:
    """Compare one weight with what was loaded for it."""
    grid, notes = _grid(stored, module, dtype), []
    try:
        found, scales = schemes.held(stored, weight.quantizer, tuple(weight.codes.shape))
    except ValueError as error:
        return Layer(name, 1, grid, False, False, False, str(error))
    wrong = int((found.to(torch.int16) != weight.codes.cpu().to(torch.int16)).sum())
    expected = weight.scales.cpu().float()
    off = int((scales != expected).sum()) if scales.shape == expected.shape else expected.numel()
    if weight.tensor_scale is not None and "weight_global_scale" in stored:
        off += int(stored["weight_global_scale"].cpu().reshape(()) != schemes.inverse(weight.tensor_scale))
    decoded, value = weight.decode(), module.get_parameter("weight").detach().cpu()
    differing = int((value.float() != decoded.to(value.dtype).float()).sum())
    for count, total, what in ((wrong, found.numel(), "codes"), (off, expected.numel(), "scales"), (differing, decoded.numel(), "values")):
        if count:
            notes.append(f"{count} of {total} {what} differ")
    return Layer(name, 1, grid, not wrong, not off, not differing, "; ".join(notes))


def _grid(stored: Stored, module: nn.Module, dtype: torch.dtype | None) -> str:
    """Describe a weight as it was loaded."""
    weights: Any = module.quantization_scheme.weights  # type: ignore[union-attr]
    block = f"block {weights.group_size}" if weights.group_size else str(weights.strategy)
    scales = str(dtype).removeprefix("torch.")
    return f"{weights.type}{weights.num_bits} {block}, {scales} scales"
