"""Packing: codes of any bit width, back to back in bytes, the first code in the lowest bits.

Eight codes of b bits fill b bytes exactly, so every width from 1 to 8 is packed without gaps; the last group is padded with zeros.
"""

import torch
from torch import Tensor

from stepwell.formats import Format

WHOLE = (1, 2, 4, 8)  # widths of which a whole number fills a byte: no wider integers are needed
CHUNK = 1 << 20  # codes handled at a time: the working set is 64 bits per code


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` codes of `bits` bits take."""
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes as bytes.

    Args:
        codes: integers of any shape; negative ones are stored in two's complement.
        bits: width of one code, 1..8.

    Returns:
        uint8 `(packed_bytes(codes.numel(), bits),)`.

    >>> pack(torch.tensor([1, 2, 3, 0, -1, -2, 1, 1]), 2)
    tensor([57, 91], dtype=torch.uint8)
    """
    flat = codes.reshape(-1)
    parts = []
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        if bits in WHOLE:
            parts.append(_whole(part, bits))
            continue
        part = part.to(torch.int64) & (2**bits - 1)
        part = torch.nn.functional.pad(part, (0, -part.numel() % 8)).reshape(-1, 8)
        word = (part << torch.arange(0, 8 * bits, bits)).sum(1)
        parts.append((word[:, None] >> torch.arange(0, 8 * bits, 8)) & 255)
    return torch.cat([part.reshape(-1) for part in parts]).to(torch.uint8)


def unpack(packed: Tensor, format: Format, count: int) -> Tensor:
    """Return the first `count` codes of a packed format, `(count,)`, int8 or uint8 as `Encoded` holds them.

    Raises:
        ValueError: fewer or more bytes than `count` codes take.
    """
    bits = format.bits
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"`packed` must hold {packed_bytes(count, bits)} bytes for {count} codes of {bits} bits: got {packed.numel()}. "
            "The file may be truncated."
        )
    parts = []
    for start in range(0, packed.numel(), CHUNK // 8 * bits):
        if bits in WHOLE:
            places = torch.arange(0, 8, bits, dtype=torch.uint8)
            parts.append(((packed[start : start + CHUNK // 8 * bits, None] >> places) & (2**bits - 1)).reshape(-1))
            continue
        group = packed[start : start + CHUNK // 8 * bits].to(torch.int64).reshape(-1, bits)
        word = (group << torch.arange(0, 8 * bits, 8)).sum(1)
        parts.append(((word[:, None] >> torch.arange(0, 8 * bits, bits)) & (2**bits - 1)).reshape(-1))
    codes = torch.cat(parts)[:count] if parts else torch.zeros(0, dtype=torch.int64)
    if min(format.codes) < 0:
        half = 2 ** (bits - 1)
        codes = (codes ^ half).to(torch.int16).sub_(half)  # the highest bit is the sign
    return codes.to(torch.uint8 if max(format.codes) > 127 else torch.int8)


def _whole(codes: Tensor, bits: int) -> Tensor:
    """Return codes of which a whole number fills a byte as bytes; groups of eight are filled with zeros."""
    filled = torch.nn.functional.pad(codes.to(torch.uint8) & (2**bits - 1), (0, -codes.numel() % 8)).reshape(-1, 8 // bits)
    packed = filled[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= filled[:, place] << (bits * place)
    return packed
