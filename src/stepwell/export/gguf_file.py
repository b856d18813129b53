"""A GGUF file as its own library reads it, after its header has been walked: nothing a file says of its own lengths is believed.

`gguf`'s reader maps whatever a header promises, and a lying count can keep it busy forever; so every length is first held against the file.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepwell.export.extras import need

MAGIC, VERSIONS = b"GGUF", (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by ggml's number for its type
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4


class Stored(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: the file's name for it.
        type: ggml's name of its type, such as Q4_0 or F32.
        shape: `(rows, columns)` as PyTorch has it, or one number.
        data: `(rows, bytes)` uint8 for blocks, else the numbers.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: NDArray[Any]


class GgufFile(NamedTuple):
    """What a file holds: its key-value pairs, tokens left out, and its tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Stored]


def read(path: str | Path) -> GgufFile:
    """Read a GGUF file, whoever wrote it; the tensors stay on the disk until they are used.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        FileNotFoundError: no such file.
        ValueError: no GGUF file, or one whose header does not fit it.
    """
    need("gguf", extra="export")
    from gguf import GGUFReader

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path`: no file at {path}. Give the .gguf file that an export wrote.")
    try:
        with path.open("rb") as file:
            walk(_Header(file, path.stat().st_size))
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
        tensors = {
            part.name: Stored(part.name, part.tensor_type.name, tuple(int(size) for size in reversed(part.shape)), part.data)
            for part in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, EOFError, struct.error) as error:
        raise ValueError(f"`path`: {path} is not a readable GGUF file ({str(error).rstrip('.') or type(error).__name__}).") from error
    return GgufFile(fields, tensors)


def values(stored: Stored) -> NDArray[np.float32]:
    """Return a tensor's numbers in float32, by `gguf`'s own dequantizers, in its shape.

    Raises:
        ValueError: a type that `gguf` cannot dequantize.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        numbers = dequantize(np.ascontiguousarray(stored.data), GGMLQuantizationType[stored.type])
    except NotImplementedError as error:
        raise ValueError(f"`path`: tensor {stored.name!r} is of type {stored.type}, which `gguf` does not decode.") from error
    return np.asarray(numbers, dtype=np.float32).reshape(stored.shape)


class _Header:
    """Bytes of a file, read in order and never beyond its end."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self.check(count)
        found: bytes = self.file.read(count)
        return found

    def skip(self, count: int) -> None:
        """Pass over bytes that must be there."""
        self.check(count)
        self.file.seek(count, 1)

    def check(self, count: int) -> None:
        """Refuse to go beyond the end."""
        if count > self.size - self.file.tell():
            raise ValueError(f"it promises {count} bytes at byte {self.file.tell()} and has {self.size - self.file.tell()} left")

    def number(self, form: str) -> int:
        """Return one little-endian integer."""
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        """Return one string."""
        return self.take(self.number("Q")).decode("utf-8")


def walk(header: _Header) -> None:
    """Go through a header and hold every length in it against the file.

    Raises:
        ValueError: it is no GGUF header, or promises what is not there.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if header.take(4) != MAGIC or (version := header.number("I")) not in VERSIONS:
        raise ValueError(f"no GGUF header of version {VERSIONS[0]} or {VERSIONS[1]}")
    assert version
    tensors, fields = header.number("Q"), header.number("Q")
    alignment = 32
    for _ in range(fields):
        name, kind = header.text(), header.number("I")
        if name == "general.alignment" and kind == 4:
            alignment = header.number("I")
            if not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
                raise ValueError(f"an alignment of {alignment}")
        else:
            _pass_value(header, kind)
    ends = []
    for _ in range(tensors):
        name, count = header.text(), header.number("I")
        if not 0 < count <= _DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {count} dimensions")
        shape = [header.number("Q") for _ in range(count)]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(header.number("I"))]
        offset = header.number("Q")
        elements = 1
        for length in shape:
            elements *= length
        if not elements or shape[0] % block or offset % alignment:
            raise ValueError(f"tensor {name!r} of shape {shape} does not fit blocks of {block}, or lies at byte {offset}")
        ends.append((offset, offset + elements // block * size, name))
    start = -(-header.file.tell() // alignment) * alignment
    last = 0
    for begin, end, name in sorted(ends):
        if begin < last or start + end > header.size:
            raise ValueError(f"tensor {name!r} overlaps another, or lies beyond the end")
        last = end


def _pass_value(header: _Header, kind: int) -> None:
    """Go over one value."""
    if kind == _STRING:
        header.skip(header.number("Q"))
    elif kind == _ARRAY:
        inner, count = header.number("I"), header.number("Q")
        if inner in _SIZES:
            header.skip(_SIZES[inner] * count)
        elif inner == _STRING:
            header.check(8 * count)  # every string has a length at least
            for _ in range(count):
                header.skip(header.number("Q"))
        else:
            raise ValueError(f"an array of values of type {inner}")
    elif kind in _SIZES:
        header.skip(_SIZES[kind])
    else:
        raise ValueError(f"a value of type {kind}")
