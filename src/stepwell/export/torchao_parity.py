"""torchao parity: what transformers loaded into torchao's tensors, against the model it came from."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.export.certificate import Certificate, Layer
from stepwell.export.deployed import owners, plain
from stepwell.export.extras import need
from stepwell.export.hf_folder import check_model, load_folder, read_floats
from stepwell.export.hf_parity import float_part, narrow_cause, running
from stepwell.export.outputs import certify, compare
from stepwell.export.torchao_tensors import held
from stepwell.quantizers import Encoded


def check(path: Path, model: nn.Module, example: tuple[Tensor, ...], encoded: Mapping[str, Encoded]) -> Certificate:
    """Load a folder of torchao tensors with transformers and compare weights and outputs; arguments as in `verify`, already checked.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        ValueError: a folder that transformers does not load, or a model or example that does not fit it.
    """
    need("torchao", "transformers", extra="export")
    check_model(model, "torchao")
    loaded = load_folder(model, path)
    run = running(loaded)
    runs = compare(model, encoded, run, example)
    floats = read_floats(path)
    found = {name: tensor for name, tensor in loaded.named_parameters() if hasattr(tensor, "qdata")}
    layers = [*_layers(model, found, encoded, floats), *float_part(model, loaded, encoded, floats, coded=set(found))]
    causes = narrow_cause(model, encoded, run, example, runs, loaded.dtype)  # type: ignore[arg-type]
    release = f"{version('transformers')} with torchao {version('torchao')}"
    return certify(path, layers, runs, runtime="transformers", version=release, causes=causes)


def _layers(model: nn.Module, found: Mapping[str, Any], encoded: Mapping[str, Encoded], floats: Mapping[str, str]) -> Iterator[Layer]:
    """Yield a row for every encoded weight that should be in codes, and for every other one that is."""
    mine = owners(model)
    claimed = set()
    for name, weight in encoded.items():
        if name in floats:
            continue
        alias = next((alias for alias, parameter in mine.items() if parameter is mine[name] and alias in found), None)
        if alias is None:
            yield Layer(name, 0, "-", False, False, False, "not in codes in the folder, and not listed as float")
            continue
        claimed.add(alias)
        yield _against(name, weight, found[alias])
    for name in [name for name in found if name not in claimed]:
        value, own = found[name].dequantize(), mine.get(name)
        equal = own is not None and torch.equal(value.float().cpu(), plain(own).to(value.dtype).float())
        codes = False if encoded else None
        note = "in the folder, but not in `encoded`" if encoded else "" if equal else f"the model's {name} differs"
        yield Layer(name, 1, _grid(found[name]), codes, codes, equal, note)


def _against(name: str, weight: Encoded, stored: Any) -> Layer:
    """Compare one weight with what was loaded for it."""
    codes, scales, zeros = (part.cpu() for part in held(stored, weight.quantizer))
    if codes.shape != weight.codes.shape or scales.shape != weight.scales.shape:
        return Layer(name, 1, _grid(stored), False, False, False, f"it has shape {tuple(codes.shape)} and scales {tuple(scales.shape)}")
    expected = torch.zeros_like(zeros) if weight.zero_points is None else weight.zero_points.cpu().float()
    value, decoded = stored.dequantize().cpu(), weight.decode()
    counts = (
        (int((codes != weight.codes.cpu().to(torch.int16)).sum()) + int((zeros != expected).sum()), codes.numel(), "codes"),
        (int((scales != weight.scales.cpu().float()).sum()), scales.numel(), "scales"),
        (int((value.float() != decoded.to(value.dtype).float()).sum()), value.numel(), "values"),
    )
    equal = [not wrong for wrong, _, _ in counts]
    note = "; ".join(f"{wrong} of {total} {what} differ" for wrong, total, what in counts if wrong)
    return Layer(name, 1, _grid(stored), equal[0], equal[1], equal[2], note)


def _grid(stored: Any) -> str:
    """Describe a weight as it was loaded."""
    dtype, scales = (str(part).removeprefix("torch.") for part in (stored.target_dtype, stored.scale.dtype))
    return f"{dtype} block {stored.block_size[-1]}, {scales} scales"
