"""The two passes that most runs make, each in one sweep over memory, compiled by numba. Only `fused` imports this, and does without.

Indices are unsigned: signed ones may count from the end, and checking that keeps a loop from becoming vector instructions. Sums may be
reordered for the same reason; nothing else departs from what is written here. A block's maximum is that of its bit patterns, which is
exact, in vectors, and has a NaN above all else.
"""

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]

MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)

ROWS, NUMBER = "float32[:, ::1]", "float32"


@njit(f"void({ROWS}, {ROWS}, {NUMBER})", cache=True, nogil=True, error_model="numpy")
def deploy(parameter: Array, latent: Array, edge: float) -> None:
    """As `passes.deploy` of the nearest grid weights, bit for bit. `edge`: the grid's largest value; its lowest is `-edge`."""
    bits, length = parameter.view(np.int32), np.uint64(parameter.shape[1])
    largest = np.empty(1, np.float32)
    pattern = largest.view(np.int32)
    for k in range(np.uint64(parameter.shape[0])):
        top = np.int32(0)
        for j in range(length):
            top = max(top, bits[k, j] & MAGNITUDE)
        pattern[0] = top
        scale = largest[0] / edge
        divisor = np.float32(np.inf) if scale == ZERO else scale
        for j in range(length):
            weight = parameter[k, j]
            latent[k, j] = weight
            parameter[k, j] = min(max(np.rint(weight / divisor), -edge), edge) * scale


@njit(f"void({ROWS}, float32[::1], {NUMBER}, boolean)", cache=True, nogil=True, error_model="numpy")
def absmax(weight: Array, scale: Array, edge: float, signed: bool) -> None:
    """As `scales.absmax`, bit for bit: what puts each block's largest weight on the edge of the grid; `signed`: on the lowest value."""
    bits, length = weight.view(np.int32), np.uint64(weight.shape[1])
    largest = np.empty(2, np.float32)
    pattern = largest.view(np.int32)
    for k in range(np.uint64(weight.shape[0])):
        top = bottom = np.int32(0)
        if signed:
            for j in range(length):
                top = max(top, bits[k, j])  # negative numbers are negative integers
                bottom = max(bottom, bits[k, j] & MAGNITUDE if bits[k, j] < 0 else np.int32(0))
        else:
            for j in range(length):
                top = max(top, bits[k, j] & MAGNITUDE)
        pattern[0], pattern[1] = top, bottom
        scale[k] = (largest[0] / -edge if top > bottom else largest[1] / edge) if signed else largest[0] / edge


@njit(
    f"void({', '.join([ROWS] * 4 + [NUMBER] * 7)}, boolean)",
    cache=True,
    nogil=True,
    error_model="numpy",
    fastmath={"reassoc", "nsz"},
)
def push(
    weight: Array,
    moment: Array,
    curvature: Array,
    second: Array,
    factor: float,
    spread: float,
    floor: float,
    pull: float,
    edge: float,
    near: float,
    tolerance: float,
    through_scale: bool,
) -> None:
    """As `passes.push` of LOTION's penalty on a symmetric integer grid, but for the order of its sums.

    `factor`, `spread`, `floor`: as there; `pull`: half the strength in loss terms; `edge`: the grid's largest value; `near`: from where
    on a weight sits on it; `tolerance`: how far from a grid value one lies on it.
    """
    bits, length = weight.view(np.int32), np.uint64(weight.shape[1])
    force, largest = np.empty(weight.shape[1], np.float32), np.empty(1, np.float32)
    pattern = largest.view(np.int32)
    for k in range(np.uint64(weight.shape[0])):
        top = np.int32(0)
        for j in range(length):
            top = max(top, bits[k, j] & MAGNITUDE)
        pattern[0] = top
        scale = largest[0] / edge
        if scale == ZERO:  # no cell, no force
            continue
        strength = scale * pull
        total = ties = ZERO
        for j in range(length):
            units = weight[k, j] / scale
            code = np.rint(units)
            rest = units - code
            slope = np.copysign(ONE, rest) - TWO * rest if abs(rest) > tolerance else ZERO
            size = abs(rest) if abs(rest) > tolerance else ZERO
            pulls = curvature[k, j] * strength
            total += pulls * (size - code * slope)
            ties += ONE if abs(units) > near else ZERO
            force[j] = pulls * slope
        share = total / (edge * ties) if through_scale and ties > ZERO else ZERO
        beyond = ZERO
        for j in range(length):
            units = weight[k, j] / scale
            here = force[j] + (share if units > near else ZERO) - (share if units < -near else ZERO)
            over = max(abs(here) - floor, ZERO)
            beyond += ONE if over * over > second[k, j] * spread else ZERO
            force[j] = here
        if beyond > ZERO:  # rare, and a root costs as much as all the rest
            for j in range(length):
                bound = np.sqrt(second[k, j] * spread) + floor
                force[j] = min(max(force[j], -bound), bound)
        for j in range(length):
            moment[k, j] += force[j] * factor
