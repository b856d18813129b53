"""TensorFile: a safetensors file that grows tensor by tensor, so that no more than one of them is in memory.

safetensors' own writer takes all tensors at once. The layout is theirs: eight bytes that say how long the header is, the header as JSON,
which may end in spaces, and the tensors without gaps. Room for the header is left at the start and filled at the end.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from stepwell.quantizers import Encoded
from stepwell.storage import describe, metadata, parts

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PER_TENSOR = 160  # characters of header that one tensor takes beside its name: dtype, shape, offsets
PER_WEIGHT = 3 * PER_TENSOR + 640  # its tensors and its description, which is JSON inside JSON


class TensorFile:
    """Writes tensors as they come; the file is one when the block has ended well."""

    def __init__(self, path: Path, *, room: int) -> None:
        """Open a new file.

        Args:
            path: where; nothing must be there.
            room: bytes to leave for the header.
        """
        self._path, self._room = path, -(-room // 8) * 8
        self._entries: dict[str, Any] = {}
        self._end = 0
        self.about: dict[str, str] = {}

    def __enter__(self) -> "TensorFile":
        self._file = self._path.open("xb")
        self._file.write(b"\0" * (8 + self._room))
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        shape, start = list(tensor.shape), self._end
        self._file.write(data.data)
        self._end += data.nbytes
        self._entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, self._end]}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                header = json.dumps({"__metadata__": self.about, **self._entries}, separators=(",", ":")).encode()
                assert len(header) <= self._room, f"a header of {len(header)} bytes in room for {self._room}"
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        finally:
            self._file.close()


def write_encoded(path: Path, weights: Iterable[tuple[str, Encoded]], *, names: Iterable[str]) -> None:
    """Write encoded weights one by one into a file that `stepwell.load` reads.

    Args:
        path: a new file.
        weights: names and weights, each used once and let go.
        names: the same names, known beforehand.
    """
    described: dict[str, Mapping[str, Any]] = {}
    with TensorFile(path, room=4096 + sum(PER_WEIGHT + 6 * _length(name) for name in names)) as file:
        for name, weight in weights:
            for key, tensor in parts(name, weight).items():
                file.add(key, tensor)
            described[name] = describe(weight)
        file.about = metadata(described)


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], *, names: Iterable[str]) -> None:
    """Write plain tensors one by one.

    Args:
        path: a new file.
        tensors: names and tensors, each used once and let go.
        names: the same names, known beforehand.
    """
    with TensorFile(path, room=4096 + sum(PER_TENSOR + _length(name) for name in names)) as file:
        for name, tensor in tensors:
            file.add(name, tensor)
        file.about = {"format": "pt"}


def _length(name: str) -> int:
    """Return how many bytes a name takes as JSON inside JSON, at most."""
    return 2 * len(json.dumps(json.dumps(name)))
