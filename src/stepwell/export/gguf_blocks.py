"""GGUF blocks: how ggml's block types hold the codes and scales of a matrix, byte by byte.

A row is a sequence of blocks, a block is its scale and its packed codes. Where `gguf` can quantize it takes weights and fits scales of its
own; here codes and scales are given and stay what they are, so only the layout is written, and `gguf`'s dequantizers check it.

Source: ggml's block structs, as in `gguf.quants`. Codes are stored as `code + offset`; MXFP4 stores the bit pattern, and half the scale.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from stepwell.quantizers import Encoded
from stepwell.runtimes import Target, holders, targets

Bytes = NDArray[np.uint8]
PIECE = 1 << 17  # codes that are packed together
_TERNARY_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)  # five ternary digits fill a byte


class Kind(NamedTuple):
    """One block type.

    Attributes:
        name: ggml's name.
        target: the grid it holds.
        offset: added to a code where it is stored.
        scale_last: whether the scale follows the codes.
        bytes: of one block.
    """

    name: str
    target: Target
    offset: int
    scale_last: bool
    bytes: int

    @property
    def block(self) -> int:
        """Weights per block."""
        block = self.target.quantizer.block
        assert isinstance(block, int)
        return block

    @property
    def head(self) -> int:
        """Bytes of the scale, and of the minimum where there is one."""
        return {"Q4_1": 4, "MXFP4": 1}.get(self.name, 2)


_ROWS = {row.name: row for row in targets()}
KINDS = {
    kind.name: kind
    for kind in (
        Kind("Q4_0", _ROWS["gguf:q4_0"], 8, False, 18),
        Kind("Q4_1", _ROWS["gguf:q4_1"], 0, False, 20),
        Kind("Q8_0", _ROWS["gguf:q8_0"], 0, False, 34),
        Kind("TQ2_0", _ROWS["gguf:tq2_0"], 1, True, 66),
        Kind("TQ1_0", _ROWS["gguf:tq1_0"], 1, True, 54),
        Kind("MXFP4", _ROWS["gguf:mxfp4"], 0, False, 17),
    )
}


class Held(NamedTuple):
    """A matrix as a block type holds it.

    Attributes:
        kind: the block type.
        codes: `(rows, columns)` as `Encoded` has them, int16.
        scales: `(rows, blocks)` float32.
        minimums: `(rows, blocks)` float32 weights of code 0, or None.
    """

    kind: str
    codes: NDArray[np.int16]
    scales: NDArray[np.float32]
    minimums: NDArray[np.float32] | None


def choose(encoded: Encoded, *, ternary: str = "TQ2_0") -> Kind:
    """Return the block type that holds an encoded matrix.

    Args:
        encoded: `(rows, columns)`, blocks along the columns.
        ternary: which of the two ternary types; both hold the same grid.

    Raises:
        ValueError: none does; says which targets hold the grid.
    """
    grid = encoded.quantizer
    wanted = [kind for kind in KINDS.values() if kind.target.holds(grid) and (not kind.name.startswith("TQ") or kind.name == ternary)]
    if encoded.codes.ndim != 2 or grid.axis not in (None, 1, -1):
        raise ValueError(
            f"GGUF blocks run along the columns of a matrix: got shape {tuple(encoded.codes.shape)} and axis={grid.axis}. "
            "Leave the weight out with `skip=[...]`."
        )
    if not wanted:
        names = ", ".join(f'target("{kind.target.name}")' for kind in KINDS.values())
        raise ValueError(f"GGUF has no block type for the grid {grid}. Quantize with one of {names}. {holders(grid)}")
    return wanted[0]


def pack(encoded: Encoded, kind: Kind) -> Bytes:
    """Return an encoded matrix as rows of blocks, `(rows, bytes)`; a piece at a time, so that what lies in between stays in the cache."""
    rows = encoded.codes.shape[0]
    blocks = encoded.codes.cpu().contiguous().to(torch.int8).numpy().view(np.uint8).reshape(-1, kind.block)
    packed = np.empty((len(blocks), kind.bytes), dtype=np.uint8)
    body = packed[:, : -kind.head] if kind.scale_last else packed[:, kind.head :]
    head = packed[:, -kind.head :] if kind.scale_last else packed[:, : kind.head]
    head[...] = _scales(encoded, kind)
    assert body.shape[1] == kind.bytes - kind.head
    together, form = max(1, PIECE // kind.block), _PACK.get(kind.name, _nibbles)
    for start in range(0, len(blocks), together):
        piece = slice(start, start + together)
        body[piece] = form(blocks[piece] + np.uint8(kind.offset) if kind.offset else blocks[piece])  # below zero it wraps, and comes back
    return packed.reshape(rows, -1)


def unpack(packed: Bytes, kind: Kind) -> Held:
    """Return what rows of blocks `(rows, bytes)` hold.

    Raises:
        ValueError: rows that are no whole number of blocks, or a scale that is not finite.
    """
    if packed.ndim != 2 or packed.shape[1] % kind.bytes:
        raise ValueError(f"{kind.name} rows must be whole blocks of {kind.bytes} bytes: got shape {packed.shape}.")
    rows, blocks = packed.shape[0], np.ascontiguousarray(packed).reshape(-1, kind.bytes)
    head, body = (blocks[:, -kind.head :], blocks[:, : -kind.head]) if kind.scale_last else (blocks[:, : kind.head], blocks[:, kind.head :])
    codes = _UNPACK.get(kind.name, _from_nibbles)(body).astype(np.int16) - np.int16(kind.offset)
    minimums = None
    if kind.name == "MXFP4":
        scales = np.ldexp(np.float32(1), head.astype(np.int32) - 127).astype(np.float32)
    else:
        numbers = np.ascontiguousarray(head).view(np.float16).astype(np.float32)
        scales, minimums = numbers[:, :1], numbers[:, 1:].reshape(rows, -1) if kind.name == "Q4_1" else None
    if not np.isfinite(scales).all() or (minimums is not None and not np.isfinite(minimums).all()):
        raise ValueError(f"{kind.name} scales must be finite: got {scales[~np.isfinite(scales)][:1]}.")
    if kind.name == "Q8_0":
        codes = codes.astype(np.uint8).view(np.int8).astype(np.int16)
    return Held(kind.name, codes.reshape(rows, -1), scales.reshape(rows, -1), minimums)


def hold(encoded: Encoded, kind: Kind) -> Held:
    """Return what a block type should hold of an encoded matrix; the counterpart of `unpack`."""
    zeros = None if encoded.zero_points is None else encoded.zero_points.cpu().float().numpy()
    return Held(kind.name, encoded.codes.cpu().numpy().astype(np.int16), encoded.scales.cpu().float().numpy(), zeros)


def _scales(encoded: Encoded, kind: Kind) -> Bytes:
    """Return the bytes of the scales, one row per block."""
    scales = encoded.scales.cpu().float().numpy().reshape(-1, 1)
    if kind.name == "MXFP4":  # the exponent of e8m0; scales are powers of two, exactly
        exponents: Bytes = (np.frexp(scales)[1] + 126).astype(np.uint8)
        return exponents
    if encoded.zero_points is not None:
        scales = np.concatenate([scales, encoded.zero_points.cpu().float().numpy().reshape(-1, 1)], axis=1)
    head: Bytes = np.ascontiguousarray(scales.astype(np.float16)).view(np.uint8)
    return head


def _nibbles(codes: Bytes) -> Bytes:
    """Return two codes per byte: the first half of a block in the low nibbles, the second in the high ones; eight bytes at once."""
    words = codes.view(np.uint64)
    half = words.shape[1] // 2
    packed = np.empty((len(words), half), dtype=np.uint64)
    for place in range(half):  # column by column: numpy's loop is long then
        np.left_shift(words[:, half + place], np.uint64(4), out=packed[:, place])
        packed[:, place] |= words[:, place]
    return packed.view(np.uint8)


def _from_nibbles(body: Bytes) -> Bytes:
    return np.concatenate([body & np.uint8(15), body >> np.uint8(4)], axis=1)


def _pairs(codes: Bytes) -> Bytes:
    """Return TQ2_0's bytes: of every 128 codes, four rows of 32 share their bytes."""
    parts = codes.reshape(len(codes), 2, 4, 32) << np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    packed: Bytes = np.bitwise_or.reduce(parts, axis=2).reshape(len(codes), 64)
    return packed


def _from_pairs(body: Bytes) -> Bytes:
    parts = body.reshape(len(body), 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    codes: Bytes = (parts & np.uint8(3)).reshape(len(body), 256)
    return codes


def _digits(codes: Bytes) -> Bytes:
    """Return TQ1_0's bytes: 160 codes as 5 rows of 32, 80 as 5 rows of 16, the last 16 as 4 rows of 4; ternary fractions of 256."""
    count = len(codes)
    parts = [(codes[:, :160], 5, 32), (codes[:, 160:240], 5, 16), (codes[:, 240:], 4, 4)]
    sums = [
        (part.reshape(count, rows, width).astype(np.uint16) * _TERNARY_POWERS[:rows, None]).sum(1, dtype=np.uint16)
        for part, rows, width in parts
    ]
    # the multiple of 1/243 as one of 1/256, rounded up, so that multiplying by three brings the digits out one by one
    return ((np.concatenate(sums, axis=1).astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)


def _from_digits(body: Bytes) -> Bytes:
    parts = []
    for part, rows, width in ((body[:, :32], 5, 32), (body[:, 32:48], 5, 16), (body[:, 48:], 4, 4)):
        shifted = part.reshape(len(body), 1, width) * np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:rows, None]  # modulo 256, on purpose
        parts.append(((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(body), -1))
    return np.concatenate(parts, axis=1)


def _bytes(codes: Bytes) -> Bytes:
    return codes


_PACK = {"Q8_0": _bytes, "TQ2_0": _pairs, "TQ1_0": _digits}
_UNPACK = {"Q8_0": _bytes, "TQ2_0": _from_pairs, "TQ1_0": _from_digits}
