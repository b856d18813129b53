"""Text: documents from what a user calls data, one after the other, always in the same order.

A file or a folder of text, JSON lines or parquet (column `text`, as in C4), the name of a dataset on the Hugging Face hub, which is
streamed, or, where nothing is named, the sources of the running interpreter's own library.
"""

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from stepwell.export.extras import need
from stepwell.train.corpus import python_sources

COLUMN = "text"
PLAIN = (".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".rs", ".java", ".html", ".tex")
LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)
PIECE = 1 << 16  # characters after which a long text is cut, at the end of a line
SHORT_NAMES = {"c4": "allenai/c4:en"}
ROWS = 1024  # of a parquet file, read at once


def documents(data: str | None) -> Iterator[str | None]:
    """Return an iterator over the documents of a source; None stands for a file that is no UTF-8 text.

    Args:
        data: a path, `NAME` or `NAME:CONFIG` of a dataset on the hub, or None for the interpreter's own sources.

    Raises:
        ModuleNotFoundError: what reads the source is not installed.
        ValueError: nothing there that could be text; a dataset that cannot be reached or has no column `text`.
    """
    if data is None:
        return _each(python_sources(Path(sysconfig.get_paths()["stdlib"]), whole=True))
    path = Path(data)
    if path.is_dir():
        return _each(_files(path))
    if path.is_file():
        return _each([path])
    if path.suffix in (*PLAIN, *LINES, *PARQUET) or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise ValueError(f"`data`: there is no file or folder {data!r}.")
    return _streamed(data)


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that can be read, sorted; hidden ones and caches left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        found += [Path(root, name) for name in names if name.endswith((*PLAIN, *LINES, *PARQUET)) and not name.startswith(".")]
    if not found:
        raise ValueError(
            f"`data`: the folder {folder} holds no text. Known are {', '.join((*PLAIN[:5], '..', *LINES, *PARQUET))}; give one file of "
            "any other name to have it read as text."
        )
    return sorted(found)


def _each(files: list[Path]) -> Iterator[str | None]:
    """Yield the documents of every file."""
    for path in files:
        if path.name.endswith(PARQUET):
            yield from _parquet(path)
        elif path.name.endswith(LINES):
            yield from _lines(path)
        else:
            yield from _plain(path)


def _plain(path: Path) -> Iterator[str | None]:
    """Yield a text file, in pieces where it is long."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield None
        return
    while len(text) > PIECE:
        cut = text.rfind("\n", 0, PIECE) + 1 or PIECE
        yield text[:cut]
        text = text[cut:]
    yield text


def _lines(path: Path) -> Iterator[str]:
    """Yield the `text` of every line of JSON."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(_readable(file, path), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[COLUMN]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"`data`: line {number} of {path} is no JSON object with a {COLUMN!r}: {line.strip()[:60]!r}.") from error
            yield _text(text, f"line {number} of {path}")


def _readable(file: Iterable[str], path: Path) -> Iterator[str]:
    """Yield lines, and say of which file they are where that is cut off, packed otherwise than its name says, or no UTF-8."""
    try:
        yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"`data`: {path} cannot be read as lines of JSON: {' '.join(str(error).split())[:200]}.") from error


def _parquet(path: Path) -> Iterator[str]:
    """Yield the `text` of every row."""
    need("pyarrow", extra="hf")
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(path)
        if COLUMN not in table.schema_arrow.names:
            raise ValueError(f"`data`: {path} has no column {COLUMN!r}: it has {', '.join(table.schema_arrow.names)}.")
        for batch in table.iter_batches(ROWS, columns=[COLUMN]):
            for text in batch.column(0).to_pylist():
                yield "" if text is None else _text(text, f"a row of {path}")
    except (ArrowException, OSError) as error:
        raise ValueError(f"`data`: {path} is no readable parquet file: {' '.join(str(error).split())[:200]}") from error


def _streamed(data: str) -> Iterator[str]:
    """Yield the texts of a dataset's training part as they arrive."""
    need("datasets", extra="hf")
    from datasets import load_dataset

    name, _, config = SHORT_NAMES.get(data, data).partition(":")
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            if COLUMN not in row:
                raise ValueError(f"`data`: the dataset {name!r} has no column {COLUMN!r}: it has {', '.join(row)}.")
            yield _text(row[COLUMN], f"a row of {name!r}")
    except Exception as error:  # the hub, the network, a dataset's own script: whatever they raise, the dataset cannot be had
        if "`data`" in str(error):
            raise
        raise ValueError(
            f"`data`: {data!r} is no file or folder here, and as a dataset of the hub it cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}). Without a network, download its parquet or JSON files "
            "elsewhere and give their folder."
        ) from error


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`data`: {COLUMN!r} of {where} must be a string: got {type(value).__name__}.")
    return value
