"""Save and load encoded weights: packed codes, scales in their own dtype, and the grid, in one safetensors file.

What is saved is what was encoded, never re-derived from rounded weights. Files are written beside their destination and renamed, so a
full disk or a kill leaves the old file or the new one, never half of either.
"""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepwell import formats, grids, packing
from stepwell.blocks import scale_shape
from stepwell.quantizers import Encoded, Quantizer

VERSION = 1
SINGLE = "weight"
_STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
_DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
_BY_NAME = {str(format): format for format in formats.formats()}


def save(encoded: Encoded | Mapping[str, Encoded], path: str | Path) -> None:
    """Write encoded weights to a safetensors file.

    Args:
        encoded: one weight, or a mapping from parameter names to weights.
        path: the file; its folder must exist. An existing file is replaced whole.

    Raises:
        TypeError: something that is not encoded.
        ValueError: nothing to save.
        FileNotFoundError: no such folder.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    single = isinstance(encoded, Encoded)
    if not single and not isinstance(encoded, Mapping):
        raise TypeError(f"`encoded` must be an Encoded or a mapping from names to them: got {type(encoded).__name__}.")
    weights = {SINGLE: encoded} if isinstance(encoded, Encoded) else dict(encoded)
    if not weights:
        raise ValueError("`encoded` must hold at least one weight: got an empty mapping. Was anything selected?")
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Encoded):
            raise TypeError(
                f"`encoded` must map names to Encoded: got {type(weight).__name__} for {name!r}. Use `quantizer.encode(weight)`."
            )
        tensors.update(parts(name, weight))
        described[name] = describe(weight)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: no folder at {path.parent}. Make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be a file: got the folder {path}. Name a file in it, such as {path / 'weights.safetensors'}.")
    _write(tensors, metadata(described, single=single), path)


def load(path: str | Path) -> Any:
    """Read what `save` wrote: an `Encoded`, or a dict from names to `Encoded`, as it was given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, not written by `save`, or codes, scales and description that do not agree.
    """
    weights = dict(load_each(path))
    return weights[SINGLE] if read_header(path)["single"] else weights


def load_each(path: str | Path) -> Iterator[tuple[str, Encoded]]:
    """Yield what `save` wrote one weight at a time, so that no other is in memory; errors as in `load`."""
    path = Path(path)
    header = read_header(path)
    with _open(path) as file, _damage(path):
        described = {name: _parse(entry) for name, entry in header["weights"].items()}
        stored = set(file.keys())
        expected = {f"{name}.{part}" for name, entry in described.items() for part in _parts(entry.quantizer)}
        if stored != expected:
            raise ValueError(f"tensors {sorted(stored ^ expected)[:4]} are described but not there, or there but not described")
    for name, entry in described.items():
        with _open(path) as file, _damage(path, f"weight {name!r}: "):
            weight = _weight(name, entry, file)
        yield name, weight


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the description that `save` wrote into a file, checked, without reading its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, not written by `save`, or a description that does not hold together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path`: no file at {path}. Give the safetensors file that `stepwell.save` wrote.")
    with _open(path) as file, _damage(path):
        metadata = file.metadata() or {}
    if "stepwell" not in metadata:
        raise ValueError(f"`path`: {path} is a safetensors file, but `stepwell.save` did not write it.")
    with _damage(path):
        header = json.loads(metadata["stepwell"])
        version = header["version"]
    if version != VERSION:
        raise ValueError(f"`path`: {path} has layout version {version!r}, this stepwell reads {VERSION}. Use the stepwell that wrote it.")
    with _damage(path):
        for entry in header["weights"].values():
            _parse(entry)
        if not header["weights"] or (header["single"] and set(header["weights"]) != {SINGLE}):
            raise ValueError(f"it names the weights {sorted(header['weights'])}")
        return dict(header)


def parts(name: str, weight: Encoded) -> dict[str, Tensor]:
    """Return the tensors that store one weight, by the names that they have in a file."""
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


def describe(weight: Encoded) -> dict[str, Any]:
    """Return the description of one weight, which with its tensors is all of it."""
    fields = asdict(weight.quantizer)
    del fields["levels_open"]  # says how the quantizer was built, not what it is
    return {"shape": list(weight.codes.shape), "dtype": str(weight.scales.dtype), **fields, "format": str(weight.quantizer.format)}


def metadata(described: Mapping[str, Mapping[str, Any]], *, single: bool = False) -> dict[str, str]:
    """Return what a file says of itself, from the description of every weight by name."""
    return {"stepwell": json.dumps({"version": VERSION, "single": single, "weights": described})}


class _Entry(NamedTuple):
    """The description of one weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    quantizer: Quantizer


@contextmanager
def _damage(path: Path, where: str = "") -> Iterator[None]:
    """Turn whatever a damaged description leads to into one error."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError, SafetensorError) as error:
        what = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"`path`: {path} cannot be read: {where}{what}. Save it again, or fetch it again.") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`path`: {path} is not a readable safetensors file ({error}). Other formats, pickles above all, are refused."
        ) from error


def _parts(quantizer: Quantizer) -> list[str]:
    """Return the names of the tensors that a weight of this quantizer has."""
    scaled = ["tensor_scale"] if quantizer.scale_dtype == "e4m3" else []
    return ["codes", "scales", *scaled, *(["zero_points"] if quantizer.format.levels == "affine" else [])]


def _parse(entry: dict[str, Any]) -> _Entry:
    """Read and check one weight's description."""
    fields = dict(entry)
    shape, dtype = fields.pop("shape"), fields.pop("dtype")
    if not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"a shape of {shape!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"scales of dtype {dtype!r}")
    if fields["format"] not in _BY_NAME:
        raise ValueError(f"the unknown format {fields['format']!r}")
    quantizer = Quantizer(**{**fields, "format": _BY_NAME[fields["format"]]})
    scale_shape(tuple(shape), quantizer.block, quantizer.axis)
    return _Entry(tuple(shape), _DTYPES[dtype], quantizer)


def _weight(name: str, entry: _Entry, file: Any) -> Encoded:
    """Read one weight and check it against its description."""
    quantizer, dtype = entry.quantizer, entry.dtype
    grouped = scale_shape(entry.shape, quantizer.block, quantizer.axis)
    narrow = _STORED.get(quantizer.scale_dtype, dtype)
    packed = _read(file, f"{name}.codes", torch.uint8)
    codes = packing.unpack(packed, quantizer.format, math.prod(entry.shape)).reshape(entry.shape)
    grids.check_codes(codes, quantizer.format)
    scales = _read(file, f"{name}.scales", narrow, grouped).to(dtype)
    tensor_scale = _read(file, f"{name}.tensor_scale", dtype, ()) if quantizer.scale_dtype == "e4m3" else None
    zeros = None
    if quantizer.format.levels == "affine":
        zeros = _read(file, f"{name}.zero_points", narrow if quantizer.zero == "minimum" else torch.uint8, grouped).to(dtype)
        if quantizer.zero == "integer" and float(zeros.max()) > quantizer.format.high:
            raise ValueError(f"{name}.zero_points hold {zeros.max().item():g}, beyond the codes of {quantizer.format}")
    return Encoded(codes, scales, quantizer, tensor_scale, zeros)


def _read(file: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """Read one tensor that must have this dtype and shape and be finite."""
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != shape):
        raise ValueError(f"{name} must be {dtype} of shape {shape or 'any'}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if dtype.is_floating_point and not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite")
    return tensor


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        aside.touch(exist_ok=False)
        mode = aside.stat().st_mode  # of any new file; safetensors makes one that only its owner can read
        save_file(tensors, aside, metadata)
        aside.chmod(mode)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
