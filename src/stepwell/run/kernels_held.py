"""Passes at scales that are given, each in one sweep over memory, compiled by numba. Only `fused_held` imports this, and does without.

As in `kernels`: unsigned indices, and reordered sums where there is one; nothing else departs from the eager functions. A grid is `low`,
`high` in units of the scale and `shift`, which makes its values integers (-1/2 for half-odd ones).
"""

from functools import partial
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]

ZERO, ONE, TWO, HALF, INFINITE = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5), np.float32(np.inf)
TINY = np.float32(np.finfo(np.float32).tiny)
STEP = np.float32(2.0**-24)  # of a uniform draw

ROWS, SCALES, NUMBER = "float32[:, ::1]", "float32[::1]", "float32"
GRID = "float32, float32, float32"
SUMS = {"reassoc", "nsz"}  # may be reordered

compiled = partial(njit, cache=True, nogil=True, error_model="numpy")


@compiled(f"{NUMBER}({NUMBER})")
def divisor_of(scale: float) -> Any:
    """Return what puts weights into units of a scale: a scale of zero, that of a block of zeros, puts them on zero."""
    return INFINITE if scale == ZERO else scale


@compiled(f"float32(float32, {GRID})")
def rounded(units: float, low: float, high: float, shift: float) -> Any:
    """Return the nearest grid value of a weight in units of the scale, ties to the even code."""
    if shift == ZERO:
        return min(max(np.rint(units), low), high)
    code = np.floor(units)
    odd = code == units and code != TWO * np.floor(code * HALF)
    return min(max((code - ONE if odd else code) - shift, low), high)


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {GRID})")
def nearest(parameter: Array, latent: Array, scale: Array, low: float, high: float, shift: float) -> None:
    """As `passes.deploy` of the nearest grid weights."""
    length = np.uint64(parameter.shape[1])
    for k in range(np.uint64(parameter.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        for j in range(length):
            weight = parameter[k, j]
            latent[k, j] = weight
            parameter[k, j] = rounded(weight / divisor, low, high, shift) * factor


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {GRID}, {NUMBER}, {NUMBER})")
def affine(parameter: Array, latent: Array, scale: Array, low: float, high: float, shift: float, still: float, slope: float) -> None:
    """As `passes.deploy` of PARQ's map; `still`: half of 1 - slope; `slope`: at least the smallest normal number."""
    length = np.uint64(parameter.shape[1])
    for k in range(np.uint64(parameter.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        for j in range(length):
            weight = parameter[k, j]
            latent[k, j] = weight
            units = min(max(weight / divisor, low), high)
            target = rounded(units, low, high, shift)
            rest = units - target
            rest -= min(max(rest, -still), still)
            parameter[k, j] = (target + rest / slope) * factor


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {GRID}, {NUMBER})")
def relaxed(parameter: Array, latent: Array, scale: Array, low: float, high: float, shift: float, free: float) -> None:
    """As `passes.deploy` of BinaryRelax; `free`: what is left to the latent weight."""
    length = np.uint64(parameter.shape[1])
    for k in range(np.uint64(parameter.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        for j in range(length):
            weight = parameter[k, j]
            latent[k, j] = weight
            target = rounded(weight / divisor, low, high, shift) * factor
            parameter[k, j] = (weight - target) * free + target


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, int64[::1], {GRID}, int64)")
def drawn(parameter: Array, latent: Array, scale: Array, places: Array, low: float, high: float, shift: float, key: int) -> None:
    """As `passes.deploy` of randomized rounding, draw for draw; `places`: index of each row's first element within the whole parameter."""
    length = np.uint64(parameter.shape[1])
    for k in range(np.uint64(parameter.shape[0])):
        factor, place = scale[k], np.uint64(places[k])
        divisor = divisor_of(factor)
        for j in range(length):
            weight = parameter[k, j]
            latent[k, j] = weight
            word = (place + j) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word ^= word >> np.uint64(31)
            uniform = np.float32(word >> np.uint64(40)) * STEP
            units = min(max(weight / divisor, low), high)
            code = np.floor(units)
            code -= ONE if shift != ZERO and units - code < HALF else ZERO
            lower = min(max(code - shift, low), high - ONE)
            one, two = lower * factor, (lower + ONE) * factor
            bottom, top = min(one, two), max(one, two)
            parameter[k, j] = top if uniform * (top - bottom) < min(max(weight, bottom), top) - bottom else bottom


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {NUMBER})")
def lengthen(parameter: Array, latent: Array, carried: Array, multiplier: float) -> None:
    """As `passes.lengthen`, but that torch rounds product and sum at once; `carried`: what latent weights were multiplied by."""
    length, near = np.uint64(parameter.shape[1]), multiplier < HALF
    share = multiplier if near else multiplier - ONE
    for k in range(np.uint64(parameter.shape[0])):
        factor = carried[k]
        for j in range(length):
            before, after = latent[k, j] * factor, parameter[k, j]
            parameter[k, j] = (before if near else after) + (after - before) * share


@compiled(f"void({ROWS}, {SCALES}, {GRID}, {NUMBER})")
def pulled(parameter: Array, scale: Array, low: float, high: float, shift: float, share: float) -> None:
    """As `passes.prox` of CAGE."""
    length = np.uint64(parameter.shape[1])
    for k in range(np.uint64(parameter.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        for j in range(length):
            weight = parameter[k, j]
            target = rounded(weight / divisor, low, high, shift) * factor
            parameter[k, j] = (target - weight) * share + weight


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {GRID}, {NUMBER}, {NUMBER}, {NUMBER})")
def proximal(
    parameter: Array, curvature: Array, scale: Array, low: float, high: float, shift: float, pull: float, correction: float, floor: float
) -> None:
    """As `passes.prox` of LOTION; a `correction` of zero stands for curvature that is not Adam's, whose step is the rate itself."""
    length, adam = np.uint64(parameter.shape[1]), correction > ZERO
    for k in range(np.uint64(parameter.shape[0])):
        factor = scale[k]
        divisor = divisor_of(factor)
        for j in range(length):
            steep = curvature[k, j] * pull
            slope = ONE - (steep / (np.sqrt(curvature[k, j] * correction) + floor) if adam else steep)
            units = min(max(parameter[k, j] / divisor, low), high)
            target = rounded(units, low, high, shift)
            rest, still = units - target, max((ONE - slope) / TWO, ZERO)
            rest -= min(max(rest, -still), still)
            parameter[k, j] = (target + rest / max(slope, TINY)) * factor


@compiled(f"void({ROWS}, {ROWS}, {ROWS}, {SCALES}, {NUMBER}, {NUMBER})")
def clip(gradient: Array, weight: Array, parameter: Array, scale: Array, low: float, high: float) -> None:
    """As `passes.gradient` of clipped STE."""
    length = np.uint64(gradient.shape[1])
    for k in range(np.uint64(gradient.shape[0])):
        divisor = divisor_of(scale[k])
        for j in range(length):
            gradient[k, j] *= ONE if low <= weight[k, j] / divisor <= high else ZERO
            parameter[k, j] = weight[k, j]


@compiled(f"void({ROWS}, {ROWS}, {SCALES}, {NUMBER})")
def observe(gradient: Array, mean: Array, seen: Array, least: float) -> None:
    """Take squared gradients into an average; `seen`: its steps, which are counted; `least`: the smallest share that one has in it."""
    length = np.uint64(gradient.shape[1])
    for k in range(np.uint64(gradient.shape[0])):
        seen[k] += ONE
        part = max(ONE / seen[k], least)
        for j in range(length):
            square, old = gradient[k, j] * gradient[k, j], mean[k, j]
            mean[k, j] = (square - old) * part + old


@compiled(
    f"{NUMBER}({', '.join([SCALES] * 4)}, {NUMBER}, {GRID}, {', '.join([NUMBER] * 3)})",
    fastmath=SUMS,
)
def cells(
    weight: Array,
    curvature: Array,
    force: Array,
    mark: Array,
    step: float,
    low: float,
    high: float,
    shift: float,
    pull: float,
    tolerance: float,
    near: float,
) -> Any:
    """Write the penalty's force in one block's cells and, in units, its weights on the grid's edge; return what the latter get a share of.

    `pull`: half the strength in loss terms; `tolerance`: how far from a grid value a weight lies on it; `near`: from where on it sits on
    the edge.
    """
    divisor, strength = divisor_of(step), step * pull
    total = marks = ZERO
    for j in range(np.uint64(weight.shape[0])):
        units = min(max(weight[j] / divisor, low), high)
        code = np.rint(units + shift) - shift
        rest = units - code
        slope = np.copysign(ONE, rest) - TWO * rest if abs(rest) > tolerance else ZERO
        size = abs(rest) if abs(rest) > tolerance else ZERO
        pulls = curvature[j] * strength
        total += pulls * (size - code * slope)
        force[j] = pulls * slope
        mark[j] = units if abs(units) > near else ZERO
        marks += mark[j] * mark[j]
    return total / max(marks, HALF)


@compiled(f"void({SCALES}, {SCALES}, {NUMBER}, {NUMBER})")
def bound(force: Array, second: Array, spread: float, floor: float) -> None:
    """Bound one block's forces as `passes.push` does: rarely needed, and a root costs as much as all the rest."""
    for j in range(np.uint64(force.shape[0])):
        most = np.sqrt(second[j] * spread) + floor
        force[j] = min(max(force[j], -most), most)


@compiled(
    f"void({', '.join([ROWS] * 4)}, {SCALES}, {GRID}, {', '.join([NUMBER] * 6)})",
    fastmath=SUMS,
)
def push(
    weight: Array,
    moment: Array,
    curvature: Array,
    second: Array,
    scale: Array,
    low: float,
    high: float,
    shift: float,
    factor: float,
    spread: float,
    floor: float,
    pull: float,
    tolerance: float,
    near: float,
) -> None:
    """As `passes.push` of LOTION's penalty on any integer grid; `kernels.push` serves the common one, faster."""
    length = np.uint64(weight.shape[1])
    force, mark = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.float32)
    for k in range(np.uint64(weight.shape[0])):
        share = cells(weight[k], curvature[k], force, mark, scale[k], low, high, shift, pull, tolerance, near)
        beyond = ZERO
        for j in range(length):
            force[j] += mark[j] * share
            over = max(abs(force[j]) - floor, ZERO)
            beyond += ONE if over * over > second[k, j] * spread else ZERO
        if beyond > ZERO:
            bound(force, second[k], spread, floor)
        for j in range(length):
            moment[k, j] += force[j] * factor


@compiled(f"void({', '.join([ROWS] * 4)}, {SCALES}, {GRID}, {', '.join([NUMBER] * 5)})", fastmath=SUMS)
def push_apart(
    weight: Array,
    moment: Array,
    curvature: Array,
    second: Array,
    scale: Array,
    low: float,
    high: float,
    shift: float,
    factor: float,
    spread: float,
    floor: float,
    pull: float,
    tolerance: float,
) -> None:
    """As `push` where the penalty does not reach the scale, to the same bits: one loop less, and no sums over a block."""
    length = np.uint64(weight.shape[1])
    force = np.empty(weight.shape[1], np.float32)
    for k in range(np.uint64(weight.shape[0])):
        divisor, strength, beyond = divisor_of(scale[k]), scale[k] * pull, ZERO
        for j in range(length):
            units = min(max(weight[k, j] / divisor, low), high)
            rest = units - (np.rint(units + shift) - shift)
            slope = np.copysign(ONE, rest) - TWO * rest if abs(rest) > tolerance else ZERO
            force[j] = curvature[k, j] * strength * slope
            over = max(abs(force[j]) - floor, ZERO)
            beyond += ONE if over * over > second[k, j] * spread else ZERO
        if beyond > ZERO:
            bound(force, second[k], spread, floor)
        for j in range(length):
            moment[k, j] += force[j] * factor


@compiled(
    f"void({', '.join([ROWS] * 3)}, {SCALES}, {GRID}, {', '.join([NUMBER] * 4)}, boolean)",
    fastmath=SUMS,
)
def descend(
    into: Array,
    weight: Array,
    curvature: Array,
    scale: Array,
    low: float,
    high: float,
    shift: float,
    rate: float,
    pull: float,
    tolerance: float,
    near: float,
    through_scale: bool,
) -> None:
    """As `passes.descend` of the same penalty; `rate`: the learning rate."""
    length = np.uint64(weight.shape[1])
    force, mark = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.float32)
    for k in range(np.uint64(weight.shape[0])):
        share = cells(weight[k], curvature[k], force, mark, scale[k], low, high, shift, pull, tolerance, near)
        share = share if through_scale else ZERO
        for j in range(length):
            into[k, j] = (force[j] + mark[j] * share) * rate


@compiled(f"void({', '.join([ROWS] * 3)}, {SCALES}, {SCALES}, {GRID}, {', '.join([NUMBER] * 3)})")
def couple(
    gradient: Array,
    weight: Array,
    mean: Array,
    scale: Array,
    seen: Array,
    low: float,
    high: float,
    shift: float,
    pull: float,
    tolerance: float,
    least: float,
) -> None:
    """As `passes.gradient` of coupled LOTION: add the penalty's gradient, then take the square of the task's into the average."""
    length = np.uint64(gradient.shape[1])
    for k in range(np.uint64(gradient.shape[0])):
        seen[k] += ONE
        divisor, strength, part = divisor_of(scale[k]), scale[k] * pull, max(ONE / seen[k], least)
        for j in range(length):
            task, old = gradient[k, j], mean[k, j]
            units = min(max(weight[k, j] / divisor, low), high)
            rest = units - (np.rint(units + shift) - shift)
            slope = np.copysign(ONE, rest) - TWO * rest if abs(rest) > tolerance else ZERO
            gradient[k, j] = slope * (old * strength) + task
            square = task * task
            mean[k, j] = (square - old) * part + old
