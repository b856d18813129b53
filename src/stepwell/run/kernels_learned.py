"""Passes of learned scales, compiled by numba: their slopes in one sweep over memory, and their step. Only `fused_held` imports this."""

from functools import partial

import numpy as np
from numba import njit

from stepwell.run.kernels_held import GRID, NUMBER, ONE, ROWS, SCALES, SUMS, ZERO, Array, divisor_of, rounded

compiled = partial(njit, cache=True, nogil=True, error_model="numpy")


@compiled(f"void({ROWS}, {ROWS}, {ROWS}, {SCALES}, {SCALES}, {NUMBER}, {NUMBER}, {NUMBER})", fastmath=SUMS)
def learn(gradient: Array, weight: Array, deployed: Array, scale: Array, slope: Array, low: float, high: float, stays: float) -> None:
    """As `passes.gradient` of learned scales: keep the gradient inside the grid, and sum up each block's slope in its log scale.

    `stays`: 1 where the weights stay, 0 where they will be carried along.
    """
    length = np.uint64(gradient.shape[1])
    for k in range(np.uint64(gradient.shape[0])):
        bottom, top = min(scale[k] * low, scale[k] * high), max(scale[k] * low, scale[k] * high)
        total = ZERO
        for j in range(length):
            inside = ONE if bottom <= weight[k, j] <= top else ZERO
            total += gradient[k, j] * (deployed[k, j] - weight[k, j] * inside * stays)
            gradient[k, j] *= inside
        slope[k] = total


@compiled(f"void({', '.join([SCALES] * 6)}, {', '.join([NUMBER] * 5)})")
def move(
    slope: Array,
    scale: Array,
    first: Array,
    second: Array,
    steps: Array,
    peak: Array,
    lr: float,
    rate: float,
    one: float,
    two: float,
    eps: float,
) -> None:
    """As `Learned.step`: one Adam step of every log scale; `one`, `two`: its betas."""
    counted, bias, spread = -ONE, ONE, ONE
    for k in range(np.uint64(scale.shape[0])):
        steps[k] += ONE
        if steps[k] != counted:  # all have begun together, and a power costs more than all the rest
            counted = steps[k]
            bias, spread = ONE - one**counted, ONE - two**counted
        peak[k] = max(peak[k], lr)
        first[k] += (slope[k] - first[k]) * (ONE - one)
        second[k] = second[k] * two + slope[k] * slope[k] * (ONE - two)
        share = lr / peak[k] if peak[k] > ZERO else ZERO
        scale[k] *= np.exp(-rate * share * (first[k] / bias) / (np.sqrt(second[k] / spread) + eps))


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {SCALES}, {GRID})", fastmath=SUMS)
def weigh(gradient: Array, weight: Array, scale: Array, slope: Array, low: float, high: float, shift: float) -> None:
    """As `passes.gradient` of learned scales under a latent forward pass: sum up the slope of the weighted rounding error."""
    length = np.uint64(gradient.shape[1])
    for k in range(np.uint64(gradient.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        bottom, top = min(factor * low, factor * high), max(factor * low, factor * high)
        total = ZERO
        for j in range(length):
            value = weight[k, j]
            target = rounded(value / divisor, low, high, shift) * factor
            inside = ONE if bottom <= value <= top else ZERO
            total += (target - value) * gradient[k, j] * gradient[k, j] * (target - value * inside)
        slope[k] = total
