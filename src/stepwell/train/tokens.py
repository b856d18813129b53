"""Tokens: memory-mapped files of token numbers, and the order in which training reads them.

An index names the files' lengths and digests (`tokenized` writes both). What a step reads depends on the seed, the step and the row
of the batch alone, so that it survives a stop and a change of world size: every epoch visits every sequence once, in an order of its own.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

INDEX, TOKENIZER = "tokens.json", "tokenizer"
VERSION = 1
TRAIN, HELD = "train", "held"


@dataclass(frozen=True)
class Part:
    """One part of the data, as sequences that overlap by the one token that ends the one and begins the next.

    Attributes:
        shards: memory-mapped files.
        tokens: how many in all.
    """

    shards: tuple[np.ndarray, ...]
    tokens: int

    def sequences(self, length: int) -> int:
        """Return how many sequences of `length` predicted tokens there are."""
        return max(0, (self.tokens - 1) // length)

    def rows(self, numbers: Sequence[int], length: int) -> Tensor:
        """Return sequences by their numbers, `(count, length + 1)` int64."""
        return torch.stack([torch.from_numpy(self._piece(number * length, length + 1)) for number in numbers])

    def _piece(self, start: int, count: int) -> np.ndarray:
        """Return tokens from a place on, int64, across files."""
        found = []
        for shard in self.shards:
            if count and start < len(shard):
                found.append(np.asarray(shard[start : start + count], dtype=np.int64))
                count -= len(found[-1])
                start = 0
            else:
                start -= len(shard)
        return np.concatenate(found)


class Tokens(NamedTuple):
    """Both parts of the data, and what the index says of them.

    Attributes:
        train, held: the parts.
        facts: the index: source, counts of documents, vocabulary, digests.
        folder: where they lie, with the tokenizer.
    """

    train: Part
    held: Part
    facts: dict[str, Any]
    folder: Path


def batch(part: Part, rows: Iterable[int], *, step: int, size: int, length: int, seed: int) -> Tensor:
    """Return some rows of the batch of a step, `(rows, length + 1)` int64.

    Args:
        part: the data.
        rows: which rows of the whole batch; each process asks for its own.
        step: optimizer steps done before.
        size: rows of the whole batch.
        length: tokens that a row predicts.
        seed: of the order.
    """
    count = part.sequences(length)
    places = (divmod(step * size + row, count) for row in rows)
    return part.rows([int(_order(seed, epoch, count)[place]) for epoch, place in places], length)


def open_tokens(folder: Path, *, verify: bool = True) -> Tokens:
    """Map the tokens of a folder that `prepare` wrote.

    Args:
        folder: with `tokens.json`.
        verify: compare every file with its digest, which reads it once; lengths are compared in any case.

    Raises:
        FileNotFoundError: no index there.
        ValueError: an index that cannot be read, a file that is missing, cut off or changed; it is named. No tokenizer beside it.
    """
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"`data`: {folder} has no {INDEX}, so it holds no tokens.")
    if not (folder / TOKENIZER).is_dir():
        raise ValueError(f"`data`: {folder} lacks its {TOKENIZER}, without which the model cannot be written. Give the text itself.")
    try:
        facts = json.loads(index.read_text(encoding="utf-8"))
        if facts["version"] != VERSION:
            raise ValueError(f"layout version {facts['version']!r}, this stepwell reads {VERSION}")
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[facts["dtype"]])
        parts = {name: _part(folder, facts["parts"][name], dtype, verify) for name in (TRAIN, HELD)}
    except (KeyError, TypeError, ValueError) as error:
        if "`data`" in str(error):
            raise
        raise ValueError(
            f"`data`: {index} cannot be used ({type(error).__name__}: {error}). Remove {folder} to have it made again."
        ) from error
    return Tokens(parts[TRAIN], parts[HELD], facts, folder)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of an epoch."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little") >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


def _part(folder: Path, described: Sequence[dict[str, Any]], dtype: np.dtype, verify: bool) -> Part:
    """Map the files of one part."""
    shards = []
    for one in described:
        path, tokens = folder / one["file"], int(one["tokens"])
        size = path.stat().st_size if path.is_file() else -1
        if size != tokens * dtype.itemsize:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise ValueError(
                f"`data`: the shard {path} {found}, its index says {tokens * dtype.itemsize}. Remove {folder} to have it made again."
            )
        if verify and sha256(path) != one["sha256"]:
            raise ValueError(
                f"`data`: the shard {path} is not what was written: its SHA-256 differs from the index. Remove {folder} to have it made "
                "again."
            )
        shards.append(np.memmap(path, dtype=dtype, mode="r", shape=(tokens,)))
    return Part(tuple(shards), sum(len(shard) for shard in shards))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
