"""Save and load encoded weights: packed codes, scales in their own dtype, and the grid, in one safetensors file.

What is saved is what was encoded, never re-derived from rounded weights. Files are written beside their destination and renamed, so a
full disk or a kill leaves the old file or the new one, never half of either.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepwell import formats, packing
from stepwell.blocks import scale_shape
from stepwell.quantizers import Encoded, Quantizer

VERSION = 1
SINGLE = "weight"
_STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
_BY_NAME = {str(format): format for format in formats.formats()}


def save(encoded: Encoded | Mapping[str, Encoded], path: str | Path) -> None:
    """Write encoded weights to a safetensors file.

    Args:
        encoded: one weight, or a mapping from parameter names to weights.
        path: the file; its folder must exist. An existing file is replaced whole.

    Raises:
        ValueError: nothing to save.
    """
    weights = {SINGLE: encoded} if isinstance(encoded, Encoded) else dict(encoded)
    if not weights:
        raise ValueError("`encoded` must hold at least one weight: got an empty mapping. Was anything selected?")
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, weight in weights.items():
        tensors.update(_tensors(name, weight))
        described[name] = {"shape": list(weight.codes.shape), "dtype": str(weight.scales.dtype), **_describe(weight.quantizer)}
    header = {"version": VERSION, "single": isinstance(encoded, Encoded), "weights": described}
    _write(tensors, {"stepwell": json.dumps(header)}, Path(path))


def load(path: str | Path) -> Any:
    """Read what `save` wrote: an `Encoded`, or a dict from names to `Encoded`, as it was given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, not written by `save`, or codes, scales and description that do not agree.
    """
    path = Path(path)
    header = read_header(path)
    with _open(path) as file:
        names = set(file.keys())
        try:
            weights = {name: _weight(name, entry, names, file) for name, entry in header["weights"].items()}
        except (KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"`path`: {path} describes its weights in a way that cannot be read ({error!r}). Save it again.") from error
    return weights[SINGLE] if header.get("single") else weights


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the description that `save` wrote into a file, without reading its tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path`: no file at {path}. Give the safetensors file that `stepwell.save` wrote.")
    with _open(path) as file:
        metadata = file.metadata() or {}
    try:
        header = json.loads(metadata["stepwell"])
        version = header["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"`path`: {path} is a safetensors file, but `stepwell.save` did not write it.") from error
    if version != VERSION:
        raise ValueError(f"`path`: {path} has layout version {version!r}, this stepwell reads {VERSION}. Use the stepwell that wrote it.")
    return dict(header)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`path`: {path} is not a readable safetensors file ({error}). Other formats, pickles above all, are refused."
        ) from error


def _describe(quantizer: Quantizer) -> dict[str, Any]:
    return {**asdict(quantizer), "format": str(quantizer.format)}


def _tensors(name: str, weight: Encoded) -> dict[str, Tensor]:
    """Return the tensors that store one weight."""
    quantizer, dtype = weight.quantizer, _STORED.get(weight.quantizer.scale_dtype)
    narrow = weight.scales.dtype if dtype is None else dtype
    stored = {
        f"{name}.codes": packing.pack(weight.codes.cpu(), quantizer.format.bits),
        f"{name}.scales": weight.scales.to(narrow),
    }
    if weight.tensor_scale is not None:
        stored[f"{name}.tensor_scale"] = weight.tensor_scale
    if weight.zero_points is not None:
        stored[f"{name}.zero_points"] = weight.zero_points.to(narrow if quantizer.zero == "minimum" else torch.uint8)
    return {key: value.detach().cpu().contiguous().clone() for key, value in stored.items()}


def _weight(name: str, entry: dict[str, Any], names: set[str], file: Any) -> Encoded:
    """Read one weight and check it against its description."""
    entry = dict(entry)
    shape, dtype = tuple(int(size) for size in entry.pop("shape")), {"torch.float64": torch.float64}.get(entry.pop("dtype"), torch.float32)
    if entry["format"] not in _BY_NAME:
        raise ValueError(f"`path`: weight {name!r} has the unknown format {entry['format']!r}. Known: {', '.join(_BY_NAME)}.")
    quantizer = Quantizer(**{**entry, "format": _BY_NAME[entry["format"]]})
    grouped, count = scale_shape(shape, quantizer.block, quantizer.axis), 1
    for size in shape:
        count *= size
    codes = packing.unpack(file.get_tensor(f"{name}.codes"), quantizer.format, count).reshape(shape)
    parts = {}
    for part in ("scales", "tensor_scale", "zero_points"):
        parts[part] = file.get_tensor(f"{name}.{part}").to(dtype) if f"{name}.{part}" in names else None
    scales = parts["scales"]
    if scales is None or tuple(scales.shape) != grouped:
        found = None if scales is None else tuple(scales.shape)
        raise ValueError(f"`path`: weight {name!r} of shape {shape} needs scales of shape {grouped}: got {found}. The file is damaged.")
    if not bool(scales.isfinite().all()):
        raise ValueError(f"`path`: weight {name!r} has scales that are not finite. The file is damaged.")
    return Encoded(codes, scales, quantizer, parts["tensor_scale"], parts["zero_points"])


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write aside, then rename."""
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, aside, metadata)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
