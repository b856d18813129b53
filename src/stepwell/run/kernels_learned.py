"""Passes of learned scales, compiled by numba: slopes and their step in one sweep over memory. Only `fused_held` imports this."""

from functools import partial
from typing import Any

import numpy as np
from numba import njit

from stepwell.run.kernels_held import GRID, NUMBER, ONE, ROWS, SCALES, SUMS, ZERO, Array, divisor_of, rounded

ADAM = f"{', '.join([SCALES] * 5)}, {', '.join([NUMBER] * 5)}"

compiled = partial(njit, cache=True, nogil=True, error_model="numpy")


@compiled(f"UniTuple({NUMBER}, 2)({NUMBER}, {NUMBER}, {NUMBER})")
def corrected(steps: Any, one: float, two: float) -> Any:
    """Return the bias corrections of both moments; a power costs more than all the rest of a step."""
    return ONE - one**steps, ONE - two**steps


@compiled(f"{NUMBER}(uint64, {NUMBER}, {ADAM}, {NUMBER}, {NUMBER})")
def moved(
    k: int,
    slope: Any,
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
    bias: Any,
    spread: Any,
) -> Any:
    """As `Learned.step` of one block: an Adam step of its log scale; return what the scale was multiplied by.

    `one`, `two`: betas; `bias`, `spread`: what they are corrected by.
    """
    steps[k] += ONE
    peak[k] = max(peak[k], lr)
    first[k] += (slope - first[k]) * (ONE - one)
    second[k] = second[k] * two + slope * slope * (ONE - two)
    share = lr / peak[k] if peak[k] > ZERO else ZERO
    before = scale[k]
    scale[k] = before * np.exp(-rate * share * (first[k] / bias) / (np.sqrt(second[k] / spread) + eps))
    return scale[k] / before


@compiled(f"void({ROWS}, {ROWS}, {ROWS}, {SCALES}, {ADAM}, {NUMBER}, {NUMBER}, boolean)", fastmath=SUMS)
def learn(
    gradient: Array,
    weight: Array,
    parameter: Array,
    carried: Array,
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
    low: float,
    high: float,
    carries: bool,
) -> None:
    """As `passes.gradient` of learned scales: each block's slope in its log scale, the gradient inside the grid, and the scale's step.

    `carried`: what weights are multiplied by is written there.
    """
    length, stays = np.uint64(gradient.shape[1]), ZERO if carries else ONE
    counted, bias, spread = -ONE, ONE, ONE
    for k in range(np.uint64(gradient.shape[0])):
        bottom, top = min(scale[k] * low, scale[k] * high), max(scale[k] * low, scale[k] * high)
        total = ZERO
        for j in range(length):
            inside = ONE if bottom <= weight[k, j] <= top else ZERO
            total += gradient[k, j] * (parameter[k, j] - weight[k, j] * inside * stays)
            gradient[k, j] *= inside
        if steps[k] + ONE != counted:  # all have begun together
            counted = steps[k] + ONE
            bias, spread = corrected(counted, one, two)
        factor = moved(k, total, scale, first, second, steps, peak, lr, rate, one, two, eps, bias, spread)
        factor = carried[k] = factor if carries else ONE
        for j in range(length):
            parameter[k, j] = weight[k, j] * factor


@compiled(f"void({ROWS}, {ROWS}, {ADAM}, {GRID})", fastmath=SUMS)
def weigh(
    gradient: Array,
    weight: Array,
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
    low: float,
    high: float,
    shift: float,
) -> None:
    """As `passes.gradient` of learned scales under a latent forward pass: slopes of the weighted rounding error, and the step."""
    length = np.uint64(gradient.shape[1])
    counted, bias, spread = -ONE, ONE, ONE
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
        if steps[k] + ONE != counted:
            counted = steps[k] + ONE
            bias, spread = corrected(counted, one, two)
        moved(k, total, scale, first, second, steps, peak, lr, rate, one, two, eps, bias, spread)
