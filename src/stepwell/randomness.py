"""Counter-based randomness: a draw is a function of (seed, step, parameter name, element index) and of nothing else.

So a resumed run draws what the uninterrupted run would have drawn, and a shard draws what the whole parameter would have drawn there.
The mixer is the finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

import hashlib

import torch
from torch import Tensor

_WORD = 2**64


def stream(seed: int, step: int, name: str) -> int:
    """Return the signed 64-bit key of one parameter's draws at one step."""
    digest = hashlib.blake2b(f"{seed}|{step}|{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(
    key: int | Tensor, shape: tuple[int, ...], *, offset: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Return uniform draws in [0, 1).

    Args:
        key: from `stream`; a 0-dim int64 tensor where this is compiled, so that a new key is no new graph.
        shape: of the result, filled in row-major order with elements `offset, offset + 1, ...` of the stream.
        offset: index of the first element within the whole parameter.
        dtype: float32 (24 random bits) or float64 (53).
        device: of the result.
    """
    count = 1
    for size in shape:
        count *= size
    word = torch.arange(offset, offset + count, dtype=torch.int64, device=device).reshape(shape)
    word = word.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = word.bitwise_xor_(_right(word, shift)).mul_(_signed(factor))
    word = word.bitwise_xor_(_right(word, 31))
    bits = 24 if dtype == torch.float32 else 53
    return _right(word, 64 - bits).to(dtype).mul_(2.0**-bits)


def _right(word: Tensor, shift: int) -> Tensor:
    """Shift right without copying the sign down."""
    mask: int = 2 ** (64 - shift) - 1
    return (word >> shift) & mask


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
