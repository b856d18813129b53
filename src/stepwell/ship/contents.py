"""Contents: what a quantized file or folder holds, read without running it. Whatever is wrong with one is a ValueError that names it."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.ship.artifact import CERTIFICATE
from stepwell.ship.checkpoint import CONFIG, Stored, headers, open_checkpoint, read_json, refuse_pickle

Row = dict[str, object]
FORMS = "a .safetensors, .onnx or .gguf file, a Hugging Face folder, or what `stepwell quantize` wrote"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx")  # of one weight


@dataclass(frozen=True)
class Contents:
    """What is in a file or folder.

    Attributes:
        kind: in words.
        rows: one per quantized weight, or per tensor where none is known to be quantized.
        size: in bytes, of all files.
        notes: what else there is to say.
    """

    kind: str
    rows: list[Row]
    size: int
    notes: tuple[str, ...] = ()


def contents(path: Path) -> Contents:
    """Read what a file or folder holds.

    Raises:
        FileNotFoundError: nothing is there.
        ModuleNotFoundError: the extra that it needs is not installed.
        ValueError: a pickle, a folder without a model, or anything that cannot be read.
    """
    refuse_pickle(path, "file")
    if path.is_dir():
        with damaged(path):
            return _artifact(path) if (path / CERTIFICATE).is_file() else _folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"`file`: nothing at {path}. Give {FORMS}.")
    with damaged(path):
        if path.suffix == ".onnx":
            from stepwell.ship.contents_onnx import onnx_rows

            kind, rows = onnx_rows(path)
        else:
            kind, rows = _gguf(path) if path.suffix == ".gguf" else _safetensors(path)
    return Contents(kind, rows, path.stat().st_size)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn whatever a library meets in a damaged file into one ValueError that names it; what is not installed stays what it is.

    Raises:
        ValueError: in place of any other exception.
    """
    try:
        yield
    except (ImportError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # the libraries raise whatever their parts raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        whole = said.replace("`model`", "`file`", 1).replace("`path`", "`file`", 1)
        raise ValueError(whole if str(path) in said else f"`file`: {path} cannot be read ({whole}).") from error


def _artifact(folder: Path) -> Contents:
    """Read what our own artifact serves, and what its certificate says."""
    held = read_json(folder / CERTIFICATE)
    file, checked = held.get("file"), held.get("certificate")
    if not isinstance(file, str) or file != Path(file).name or not isinstance(checked, dict):
        raise ValueError(f"`file`: {folder / CERTIFICATE} is no certificate of `stepwell quantize`.")
    inside = contents(folder / file)
    word = "passed" if held.get("passed") is True else "NOT PASSED"
    notes = [f"{file} of {folder}, for {held.get('target')}. Certificate: {word}, by {checked.get('runtime')} {checked.get('version')}."]
    if isinstance(told := held.get("activations"), dict):
        from stepwell.ship.records import SCHEMES  # not above: it imports torch

        notes.append(f"What goes into the layers is rounded to {SCHEMES.get(str(told.get('scheme')), 'something else')}.")
    size = sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())
    return Contents(inside.kind, inside.rows, size, (*notes, *inside.notes))


def _folder(folder: Path) -> Contents:
    """Read a Hugging Face folder: its quantized weights, or all its tensors."""
    tensors = open_checkpoint(folder).tensors
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    quantization = config.get("quantization_config")
    size = sum(file.stat().st_size for file in {stored.file for stored in tensors.values()})
    if not isinstance(quantization, dict):
        return Contents("float checkpoint", _plain_rows(tensors), size)
    method, form = quantization.get("quant_method", "unknown"), quantization.get("format")
    rows = _quantized_rows(tensors)
    floats = len(tensors) - sum(int(str(row["tensors"])) for row in rows)
    return Contents(f"{method} folder{f', {form}' if form else ''}", rows or _plain_rows(tensors), size, (f"{floats} tensors in float.",))


def _quantized_rows(tensors: dict[str, Stored]) -> list[Row]:
    """Return one row per weight that is stored in parts or in a dtype of its own."""
    groups: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS or (part == "weight" and f"{module}.weight_scale" in tensors) or ":" in part or part.startswith("_weight_"):
            groups[module][part] = stored
    return [_parted_row(f"{module}.weight", parts) for module, parts in groups.items()]


def _parted_row(name: str, parts: dict[str, Stored]) -> Row:
    """Return the row of one weight from its tensors."""
    scales = [f"{one.dtype} {_shape(one.shape)}" for key, one in parts.items() if "scale" in key]
    codes = [f"{one.dtype} {_shape(one.shape)}" for key, one in parts.items() if "scale" not in key and key != "weight_shape"]
    size = sum(size_of(one.dtype, list(one.shape)) for one in parts.values())
    return {"name": name, "codes": " ".join(codes[:1]) or "-", "scales": " ".join(scales[:1]) or "-", "tensors": len(parts), "bytes": size}


def _gguf(path: Path) -> tuple[str, list[Row]]:
    """Return one row per tensor of a GGUF file."""
    from stepwell.export import gguf_file

    held = gguf_file.read(path)
    rows: list[Row] = [
        {
            "name": one.name,
            "shape": list(one.shape),
            "type": one.type,
            "bytes": int(one.data.nbytes),
            "bits_per_weight": 8 * int(one.data.nbytes) / max(1, math.prod(one.shape)),
        }
        for one in held.tensors.values()
    ]
    return f"GGUF, architecture {held.fields.get('general.architecture', 'unknown')}", rows


def _safetensors(path: Path) -> tuple[str, list[Row]]:
    """Return one row per encoded weight where `stepwell.save` wrote the file, else one per tensor."""
    from stepwell.ship.checkpoint import readable

    tensors = headers(path)
    with readable(path) as opened:
        ours = "stepwell" in (opened.metadata() or {})
    return ("encoded weights", _encoded_rows(path, tensors)) if ours else ("plain safetensors", _plain_rows(tensors))


def _encoded_rows(path: Path, tensors: dict[str, Stored]) -> list[Row]:
    """Return one row per encoded weight, with the size of all that is stored for it."""
    from stepwell.storage import read_header

    rows: list[Row] = []
    for name, entry in read_header(path)["weights"].items():
        size = sum(size_of(one.dtype, list(one.shape)) for key, one in tensors.items() if key.rpartition(".")[0] == name)
        rows.append(
            {
                "name": name,
                "shape": entry["shape"],
                "format": entry["format"],
                "block": "tensor" if entry["block"] is None else entry["block"],
                "scale": entry["rule"],
                "scale_dtype": entry["scale_dtype"],
                "bytes": size,
                "bits_per_weight": 8 * size / math.prod(entry["shape"]),
            }
        )
    return rows


def _plain_rows(tensors: dict[str, Stored]) -> list[Row]:
    return [
        {"name": name, "dtype": one.dtype, "shape": list(one.shape), "bytes": size_of(one.dtype, list(one.shape))}
        for name, one in tensors.items()
    ]


def size_of(dtype: str, shape: list[int]) -> int:
    """Return the bytes of a stored tensor; safetensors' dtype names carry their width in bits (F32, BF16, F8_E4M3; BOOL takes eight).

    >>> size_of("BF16", [3, 4]), size_of("F8_E4M3", [5]), size_of("BOOL", [6])
    (24, 5, 6)
    """
    width = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(width[0]) if width else 8) // 8


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def described(found: Contents, path: Path) -> dict[str, Any]:
    """Return contents for machines."""
    return {"file": str(path), "kind": found.kind, "bytes": found.size, "weights": found.rows, "notes": list(found.notes)}
