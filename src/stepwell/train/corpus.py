"""Corpus: the sources of the interpreter's own standard library as bytes, the text on which small language models train here.

Nothing is downloaded. The text depends on the interpreter, so results name its digest. Left out is what differs between installations of
one version: tests, programs with a window, tools for packaging, and files that a build generates. On request the first three are in:
three times the text, where its reader's own interpreter is all that counts.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VALUES = 256  # of a byte
EVERY = 10  # files: one of ten is held out for the test, another for validation
TEST, VALIDATION = 9, 4  # which of the ten
ALWAYS_OUT = frozenset(("site-packages", "dist-packages", "__pycache__"))
LEFT_OUT = ALWAYS_OUT | frozenset(
    (
        "test",
        "tests",
        "idlelib",
        "tkinter",
        "turtledemo",
        "lib2to3",
        "distutils",
        "ensurepip",
    )
)
GENERATED = "_sysconfigdata"


class Corpus(NamedTuple):
    """Bytes `(count,)`, uint8, of three sets of files in the order of their paths.

    Attributes:
        train, validation, test: the parts.
        files: how many files each part holds.
        digest: first twelve digits of the SHA-256 of paths and contents: equal digests mean equal data.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    files: tuple[int, int, int]
    digest: str


def load_corpus(folder: Path | None = None, *, whole: bool = False) -> Corpus:
    """Return the Python sources below a folder: of every ten files, the tenth is test data, the fifth validation, the rest training.

    Args:
        folder: None is the standard library of the running interpreter.
        whole: take tests, programs with a window and tools for packaging as well, which installations may lack.

    Raises:
        FileNotFoundError: fewer than ten sources there, as where the standard library lies in an archive.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else Path(folder)
    sources = python_sources(root, whole=whole)
    digest, parts = hashlib.sha256(), {TEST: bytearray(), VALIDATION: bytearray(), -1: bytearray()}
    files = dict.fromkeys(parts, 0)
    for index, path in enumerate(sources):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\n{len(content)}\n".encode() + content)
        part = index % EVERY if index % EVERY in (TEST, VALIDATION) else -1
        parts[part] += content
        files[part] += 1
    train, validation, test = (torch.frombuffer(parts[part], dtype=torch.uint8) for part in (-1, VALIDATION, TEST))
    return Corpus(train, validation, test, (files[-1], files[VALIDATION], files[TEST]), digest.hexdigest()[:12])


def python_sources(root: Path, *, whole: bool = False) -> list[Path]:
    """Return the Python sources below a folder in the order of their names; `whole` as in `load_corpus`.

    Raises:
        FileNotFoundError: fewer than ten there.
    """
    left_out = ALWAYS_OUT if whole else LEFT_OUT
    sources = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py") if _wanted(path.relative_to(root), left_out))
    if len(sources) < EVERY:
        raise FileNotFoundError(
            f"`folder` must hold at least {EVERY} Python sources: got {len(sources)} below {root}. Name another folder."
        )
    return [path for _, path in sources]


def sequences(text: Tensor, *, length: int, count: int) -> Tensor:
    """Return evenly spaced pieces of a text, for evaluation: `(count, length + 1)` int64; each byte but the first is a target.

    Args:
        text: `(bytes,)`.
        length: inputs per sequence.
        count: how many; they may not overlap.

    Raises:
        ValueError: a text too short for that.
    """
    if not 0 < count * (length + 1) <= len(text):
        raise ValueError(f"`count` sequences of `length` + 1 bytes must fit the text: got {count} of {length + 1} for {len(text)} bytes.")
    starts = torch.arange(count) * (len(text) // count)
    return _cut(text, starts, length)


def byte_batches(text: Tensor, *, size: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield training batches `(size, length + 1)` int64: pieces that begin anywhere in a text, drawn with replacement.

    Args:
        text: `(bytes,)`.
        size: sequences per batch.
        length: inputs per sequence.
        steps: number of batches.
        seed: two calls with the same seed yield the same batches.

    Raises:
        ValueError: a text too short for one sequence.
    """
    if len(text) <= length:
        raise ValueError(f"`length` + 1 bytes must fit the text: got length={length} for {len(text)} bytes.")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _cut(text, torch.randint(len(text) - length, (size,), generator=generator), length)


def _wanted(path: Path, left_out: frozenset[str]) -> bool:
    """Say whether a file, relative to the library's folder, belongs to the corpus."""
    return not (left_out & set(path.parts[:-1]) or path.name.startswith(GENERATED))


def _cut(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length + 1)].long()
