"""Checkpoint: the tensors of a folder of safetensors, read one at a time, sharded or not. Nothing else is ever opened.

What a file says of itself is not believed: shards must lie in the folder, hold what the index promises, and have a header that agrees with
their size.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = 1 << 26  # bytes of an index or a config: those of the largest models take a few megabytes
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that can be quantized


@dataclass(frozen=True)
class Stored:
    """One tensor as its file describes it: where it is, its shape, and its dtype by safetensors' name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors.

    Attributes:
        folder: where it lies.
        tensors: every tensor by name, in the order of the files.
    """

    folder: Path
    tensors: dict[str, Stored]

    def read(self, name: str) -> "Tensor":
        """Return one tensor; its file is opened for it alone, so that no other stays in memory.

        Raises:
            ValueError: the file is damaged, or no longer what it was.
        """
        stored = self.tensors[name]
        with readable(stored.file) as file:
            tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != stored.shape:
            raise ValueError(f"`model`: {stored.file} has changed while it was read: {name!r} is now {tuple(tensor.shape)}.")
        return tensor.clone()  # the file's pages are given back

    def slices(self) -> "dict[str, Slice]":
        """Return every tensor by name, each read when it is indexed, as `safetensors.safe_open(..).get_slice(..)` would be."""
        return {name: Slice(self, name) for name in self.tensors}

    @property
    def elements(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values())


@dataclass(frozen=True)
class Slice:
    """One tensor of a checkpoint that is read when it is indexed, and whose file is mapped for that long only."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, where: Any) -> "Tensor":
        return self.checkpoint.read(self.name)[where]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the headers of a folder's safetensors: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        ValueError: no folder, nothing but pickles, an index that is damaged or names files elsewhere, shards that are missing, damaged or
            lack a tensor that the index promises.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`model`: there is no folder {folder}.")
    index = folder / INDEX
    promised = _shards(index) if index.is_file() else {}
    files = list(dict.fromkeys(promised.values())) if promised else [_single(folder)]
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in headers(file).items():
            if promised.get(name, file) != file:
                continue  # the index says that another shard's counts
            if name in found:
                both = f"{found[name].file.name} and {file.name}"
                raise ValueError(f"`model`: {name!r} is in {both}, and {INDEX} does not say which counts.")
            found[name] = stored
    lacking = [name for name in promised if name not in found]
    if lacking:
        raise ValueError(f"`model`: {promised[lacking[0]]} lacks {len(lacking)} tensors that {INDEX} promises, such as {lacking[0]!r}.")
    if not found:
        raise ValueError(f"`model`: {files[0]} holds no tensor.")
    return Checkpoint(folder, found)


def headers(file: Path) -> dict[str, Stored]:
    """Return the description of every tensor in one safetensors file.

    Raises:
        ValueError: no such file, or a header that is damaged or does not agree with the file's size.
    """
    with readable(file, framework="numpy") as opened:  # which need not know the dtypes
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return {name: Stored(file, tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Read a small JSON file that must hold an object.

    Raises:
        ValueError: missing, too large, no JSON, or no object.
    """
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"`model`: {file} has {file.stat().st_size:,} bytes, more than any such file needs.")
        held = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"`model`: {file.parent} has no {file.name}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"`model`: {file} is no readable JSON ({error}).") from error
    if not isinstance(held, dict):
        raise ValueError(f"`model`: {file} must hold a JSON object: got {type(held).__name__}.")
    return held


@contextmanager
def readable(file: Path, *, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file; whatever is wrong with it, then or while it is read, becomes one error that names it.

    Raises:
        ValueError: in place of safetensors' own.
    """
    try:
        with safe_open(file, framework=framework) as opened:
            yield opened
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the latter two: a dtype that this torch does not have
        raise ValueError(f"`model`: {file} is not a readable safetensors file ({error}).") from error


def refuse_pickle(path: Path, argument: str = "model") -> None:
    """Refuse a file that may run code when it is opened, by its name.

    Raises:
        ValueError: its name is a pickle's.
    """
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"`{argument}`: {path} is a pickle, which can run code when it is opened, and is never read. Save it again as safetensors."
        )


def _shards(index: Path) -> dict[str, Path]:
    """Return the file of every tensor that an index names; only plain names of files beside it."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise ValueError(f"`model`: {index} has no `weight_map` from tensors to files.")
    for name in sorted(set(mapping.values())):
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(f"`model`: {index} names the file {name!r}: only safetensors beside it are read.")
        if not (index.parent / name).is_file():
            raise ValueError(f"`model`: {index} names {name!r}, which is not in {index.parent}.")
    return {tensor: index.parent / name for tensor, name in mapping.items()}


def _single(folder: Path) -> Path:
    """Return the only safetensors file of a folder without an index."""
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    if SINGLE in files or len(files) == 1:
        return folder / (SINGLE if SINGLE in files else files[0])
    if files:
        raise ValueError(f"`model`: {folder} holds {len(files)} safetensors and neither {SINGLE} nor {INDEX}, so it is open which count.")
    pickled = [name for name in names if name.lower().endswith(PICKLES)]
    only = f", only {', '.join(pickled[:3])}: pickles can run code and are never read. Save it again with safetensors" if pickled else ""
    raise ValueError(f"`model`: the folder {folder} has no safetensors{only}.")
