"""The soft staircase at scales that are given, in one sweep over memory, compiled by numba. Only `fused_soft` imports this.

Every weight reads the table, wherever it lies, so that no loop has a branch; and the reads, which cannot be vector instructions because a
compiler must fear that a write lands in the table, have a loop of their own (three times as fast as one loop).
"""

import numpy as np
from numba import njit

from stepwell.run.kernels_held import GRID, HALF, NUMBER, ONE, ROWS, SCALES, ZERO, Array, divisor_of, rounded

THREE = np.float32(3)


@njit(f"void({ROWS}, {ROWS}, {SCALES}, {SCALES}, {GRID}, {NUMBER}, {NUMBER}, {NUMBER})", cache=True, nogil=True, error_model="numpy")
def smoothed(
    into: Array,
    weight: Array,
    scale: Array,
    table: Array,
    low: float,
    high: float,
    shift: float,
    nodes: float,
    inner: float,
    outer: float,
) -> None:
    """As `passes.show` of the soft staircase; `into` may be the weight itself.

    `table`: what smoothing adds to a grid value, row after row of `nodes`, by how far a weight is from the border of its cell: two rows for
    every kind of grid value (weights below it, above it), and one for weights outside the grid. A kind is how many neighbours there are on
    either side, up to three. `inner`, `outer`: nodes per step of the grid.
    """
    length, last, outside = np.uint64(weight.shape[1]), nodes - ONE - ONE, np.float32(14) * nodes
    values, parts = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.float32)
    lifts, where = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.int32)
    for k in range(np.uint64(weight.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        for j in range(length):
            units = weight[k, j] / divisor
            target = rounded(units, low, high, shift)
            rest = units - target
            border = HALF - abs(rest)
            kind = min(target - low, THREE) + THREE - min(high - target, THREE)
            row = (kind + kind + (ONE if rest > ZERO else ZERO)) * nodes if border >= ZERO else outside
            place = border * inner if border >= ZERO else -border * outer
            place = place if place > ZERO else ZERO  # also a NaN
            node = min(np.floor(place), last)
            part = min(place - node, ONE)
            sign = ONE if border >= ZERO else np.copysign(ONE, -rest)
            values[j], parts[j], lifts[j], where[j] = target, part, sign, np.int32(row + node)
        for j in range(length):
            here = np.uint32(where[j])
            bottom = table[here]
            parts[j] = (table[here + np.uint32(1)] - bottom) * parts[j] + bottom
        for j in range(length):
            into[k, j] = (values[j] + lifts[j] * parts[j]) * factor
