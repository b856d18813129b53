"""Tokenized: documents written as files of token numbers with an index, in a folder that appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from stepwell.train import tokenizer as tokenizers
from stepwell.train.tokens import HELD, INDEX, TOKENIZER, TRAIN, VERSION, sha256

EVERY = 10  # documents: the last of ten is held out, while more is wanted
SHARD = 1 << 26  # tokens of a file
CHUNK = 64  # documents that are tokenized at once
NARROW = 1 << 16  # tokens that fit two bytes


class Wanted(NamedTuple):
    """How many tokens to take for training and for evaluation; fewer where the text ends before."""

    train: int
    held: int


def prepare(
    texts: Callable[[], Iterator[str | None]],
    folder: Path,
    *,
    wanted: Wanted,
    vocabulary: int,
    tokenizer: str | None = None,
    source: str = "",
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Tokenize documents into a folder that appears when all is there; a folder that is there already is left alone.

    Args:
        texts: called twice where a tokenizer is trained: each call returns the same documents.
        folder: the tokens' own.
        wanted: tokens to stop at.
        vocabulary: of the model: what a tokenizer is trained to, and what one that is given must not exceed.
        tokenizer: as in `tokenizer.named`; None trains one on the documents.
        source: what the texts are, for the index.
        progress: called with the number of tokens so far.

    Raises:
        ValueError: a tokenizer with more tokens than the vocabulary, or no text for one of the parts.
    """
    if (folder / INDEX).is_file():
        return
    made = tokenizers.trained(texts(), vocabulary) if tokenizer is None else tokenizers.named(tokenizer, texts(), vocabulary)
    count = made.get_vocab_size(with_added_tokens=True)
    if count > vocabulary:
        raise ValueError(
            f"`tokenizer` has {count} tokens, the model's vocabulary is {vocabulary}: larger numbers would have no embedding. "
            "Take a smaller tokenizer, or a recipe whose architecture has a larger `vocabulary`."
        )
    aside, begun = folder.with_name(f".{folder.name}.{os.getpid()}"), folder.parent.is_dir()
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        shutil.rmtree(left)
    try:
        aside.mkdir(parents=True)
        tokenizers.save(made, aside / TOKENIZER)
        facts = _write(texts(), aside, made, wanted, progress) | {"source": source, "vocabulary": count}
        (aside / INDEX).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if not begun:
            with suppress(OSError):  # not empty, or never made
                folder.parent.rmdir()
        raise


class _Writer:
    """Files of one part, filled one after the other."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.files: list[dict[str, Any]] = []
        self.tokens = 0
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, in as many files as they need."""
        self.tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self.files.append({"file": f"{self.name}-{len(self.files):05d}.bin", "tokens": 0})
                self._file = (self.folder / self.files[-1]["file"]).open("wb")
            room = SHARD - self.files[-1]["tokens"]
            self._file.write(tokens[:room].astype(self.dtype).tobytes())
            self.files[-1]["tokens"] += len(tokens[:room])
            tokens = tokens[room:]
            if self.files[-1]["tokens"] == SHARD:
                self.close()

    def close(self) -> None:
        """End the current file: on the disk, with its digest."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self.files[-1]["sha256"] = sha256(self.folder / self.files[-1]["file"])


def _write(texts: Iterator[str | None], folder: Path, tokenizer: Any, wanted: Wanted, progress: Callable[[int], None]) -> dict[str, Any]:
    """Write both parts and return the index without its last entries."""
    wide = tokenizer.get_vocab_size(with_added_tokens=True) > NARROW
    dtype, end = np.dtype("<u4" if wide else "<u2"), tokenizers.end_of_document(tokenizer)
    train, held = _Writer(folder, TRAIN, dtype), _Writer(folder, HELD, dtype)
    counts = {"documents": 0, "empty": 0, "unreadable": 0}
    number = 0
    try:
        while (train.tokens < wanted.train or held.tokens < wanted.held) and (some := list(islice(texts, CHUNK))):
            kept = [text for text in some if text is not None and text.strip()]
            counts["unreadable"] += sum(text is None for text in some)
            counts["empty"] += len(some) - len(kept) - sum(text is None for text in some)
            counts["documents"] += len(kept)
            for encoding in tokenizer.encode_batch_fast(kept, add_special_tokens=False):
                out = number % EVERY == EVERY - 1 and held.tokens < wanted.held
                (held if out else train).write(np.array(encoding.ids + ([] if end is None else [end]), dtype=np.int64))
                number += 1
            progress(train.tokens + held.tokens)
    finally:
        for writer in (train, held):
            writer.close()
    if not (train.tokens and held.tokens):
        raise ValueError(
            f"`data` is too short: {counts['documents']} documents with text, {counts['empty']} empty, {counts['unreadable']} that are no "
            f"UTF-8 text. One of {EVERY} documents, or pieces of a long one, is held out, so that there must be {EVERY}. Give more text."
        )
    return {
        "version": VERSION,
        "dtype": "uint32" if wide else "uint16",
        "end": end,
        **counts,
        "parts": {TRAIN: train.files, HELD: held.files},
    }
