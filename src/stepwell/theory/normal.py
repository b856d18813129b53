"""Standard normal numbers in float32, several tens at a time: the noise of the simulator.

`fill_bits` runs `LANES` independent xoshiro128++ generators side by side (period 2^128 - 1 each), and `fill_normal` turns their
integers into normal numbers by the Box-Muller transform with polynomials for the logarithm, sine and cosine. Both are plain loops
without branches, calls or tables, which the compiler turns into vector instructions (cost: benchmarks/results/simulate.json).

Sources: Blackman and Vigna, "Scrambled Linear Pseudorandom Number Generators" (arXiv:1805.01407) for the generator; Box and Muller (1958).
The coefficients are weighted minimax fits made for this file: relative error below 3e-7 for the logarithm, 1e-7 for sine and cosine.
Limits: 31 bits carry the radius, so |number| < 6.7 (a standard normal exceeds that once in 5e10 draws).
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

LANES = 64
BLOCK = 2 * LANES  # normal numbers come in pairs, so a buffer holds a multiple of this

# ln(1 + u) = u - u^2 / 2 + u^3 P(u) for u in [sqrt(1/2) - 1, sqrt(2) - 1]
_P0, _P1, _P2, _P3, _P4, _P5 = map(np.float32, (0.33334246, -0.24983267, 0.19924504, -0.17137127, 0.16024381, -0.10191730))
# sin(pi v) = v S(v^2) and cos(pi v) = C(v^2) for v in [-1/2, 1/2]
_S0, _S1, _S2, _S3, _S4 = map(np.float32, (3.1415925, -5.1677070, 2.5500314, -0.59804517, 0.077220127))
_C0, _C1, _C2, _C3, _C4 = map(np.float32, (0.99999994, -4.9347930, 4.0584121, -1.3318802, 0.21969700))

# Literals would be float64 or int64 and drag the arithmetic with them.
_ONE, _HALF, _LN2, _MINUS_TWO = np.float32(1), np.float32(0.5), np.float32(np.log(2)), np.float32(-2)
_RADIUS_BITS, _ANGLE_UNIT = np.float32(31), np.float32(2.0**-32)
_SQRT_HALF_BITS, _MANTISSA_BITS = np.int32(0x3F3504F3), np.int32(23)
# NaN and infinity keep their meaning: only reordering, fused multiply-add and the sign of zero are given up.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def aligned(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return `size` zeros that start on a cache line: vectors that straddle two lines halve the generator's speed."""
    count = size * np.dtype(dtype).itemsize
    raw = np.zeros(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype)


def new_stream(sequence: np.random.SeedSequence) -> NDArray[np.uint32]:
    """Return the `(4, LANES)` state of `LANES` generators, one column each, seeded from `sequence`."""
    state = aligned(4 * LANES, np.uint32)
    state[:] = sequence.generate_state(4 * LANES, np.uint32)
    return state.reshape(4, LANES)


@njit(cache=True, nogil=True)
def fill_bits(state: NDArray[np.uint32], bits: NDArray[np.uint32]) -> None:
    """Fill `bits`, `(blocks * LANES,)`, with random integers; entry i comes from lane `i % LANES`. Changes `state`."""
    s0, s1, s2, s3 = state[0], state[1], state[2], state[3]
    for start in range(0, bits.size, LANES):
        block = bits[start : start + LANES]
        for lane in range(LANES):
            a, b, c, d = s0[lane], s1[lane], s2[lane], s3[lane]
            total = np.uint32(a + d)
            block[lane] = np.uint32((np.uint32(total << np.uint32(7)) | np.uint32(total >> np.uint32(25))) + a)
            c ^= a
            d ^= b
            s1[lane] = b ^ c
            s0[lane] = a ^ d
            s2[lane] = c ^ np.uint32(b << np.uint32(9))
            s3[lane] = np.uint32(d << np.uint32(11)) | np.uint32(d >> np.uint32(21))


@njit(cache=True, nogil=True, fastmath=FAST)
def box_muller(bits: NDArray[np.uint32], normal: NDArray[np.float32]) -> None:
    """Turn `bits`, `(2 n,)`, into standard normal numbers of the same shape.

    The first half of the bits gives the radius: (k + 1/2) / 2^31 is uniform on (0, 1). The second half gives an angle between
    -90 and 90 degrees; its lowest bit, far below the resolution of float32, chooses the half plane.
    """
    half = bits.size // 2
    for i in range(half):
        scaled = np.float32(np.float32(np.int32(bits[i] >> np.uint32(1))) + _HALF)
        # scaled = 2^exponent (1 + u) with 1 + u between sqrt(1/2) and sqrt(2)
        raw = scaled.view(np.int32)
        exponent = np.int32(np.int32(raw - _SQRT_HALF_BITS) >> _MANTISSA_BITS)
        u = np.int32(raw - np.int32(exponent << _MANTISSA_BITS)).view(np.float32) - _ONE
        tail = _P0 + u * (_P1 + u * (_P2 + u * (_P3 + u * (_P4 + u * _P5))))
        logarithm = (np.float32(exponent) - _RADIUS_BITS) * _LN2 + (u - u * u * (_HALF - u * tail))
        radius = np.sqrt(_MINUS_TWO * logarithm)
        angle = bits[half + i]
        v = np.float32(np.int32(angle)) * _ANGLE_UNIT
        s = v * v
        sine = np.float32(radius * v * (_S0 + s * (_S1 + s * (_S2 + s * (_S3 + s * _S4)))))
        cosine = np.float32(radius * (_C0 + s * (_C1 + s * (_C2 + s * (_C3 + s * _C4)))))
        flip = np.uint32(angle << np.uint32(31))
        normal[i] = np.uint32(sine.view(np.uint32) ^ flip).view(np.float32)
        normal[half + i] = np.uint32(cosine.view(np.uint32) ^ flip).view(np.float32)


@njit(cache=True, nogil=True)
def fill_normal(state: NDArray[np.uint32], bits: NDArray[np.uint32], normal: NDArray[np.float32]) -> None:
    """Fill `normal`, `(blocks * BLOCK,)`, with standard normal numbers; `bits` is scratch of the same shape. Changes `state`."""
    fill_bits(state, bits)
    box_muller(bits, normal)
