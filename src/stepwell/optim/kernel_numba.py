"""The loops of kernel.c in numba, for machines without a C compiler. Same order of operations, same numbers.

Indices are unsigned: numba lets signed ones count from the end, which no vector loop survives. `_fused` is the one place in the update
where a product and a sum may become one instruction, and they do wherever the processor has it; only sums over a block may be reordered.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import from_dtype, njit, types

from stepwell.optim.task import NUMBERS

CHUNK = 128
SMALLEST, LIFT = np.float32(2.0**-126), np.float32(2.0**100)
ZERO, ONE, TWO, INFINITE = np.float32(0), np.float32(1), np.float32(2), np.float32(np.inf)
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
START = np.uint64(0)

Array = np.ndarray[Any, Any]
FLOATS = types.Array(types.float32, 1, "C")


def compiled(*signature: Any, fastmath: frozenset[str] = frozenset()) -> Callable[[Any], Any]:
    """Return numba's decorator; what it compiles is kept on disk where there is a place for it."""

    def decorate(function: Any) -> Any:
        decorator: Any = njit
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath), "forceinline": not signature}
        try:
            return decorator(*signature, cache=True, **options)(function)
        except RuntimeError:  # neither beside this file nor in the user's cache directory
            return decorator(*signature, **options)(function)

    return decorate


@compiled(fastmath=frozenset({"contract"}))
def _fused(a: float, b: float, c: float) -> float:
    return a * b + c


@compiled()
def _fitted(bits: Array, at: int, n: int, numbers: Any, pattern: Array, top: Array) -> float:
    """Return the scale of a block. Magnitudes are compared as bit patterns: exact, in vectors, and a NaN is the largest of all.

    `bits` and `pattern` are the weights and the two numbers in `top`, seen as integers.
    """
    above, below = np.int32(0), np.int32(0)
    if numbers.full == ZERO:
        for i in range(n):
            above = max(above, np.int32(bits[at + i] & MAGNITUDE))  # numba widens what `&` gives
        pattern[0] = above
        return top[0] / numbers.edge  # type: ignore[no-any-return]
    for i in range(n):
        size = np.int32(bits[at + i] & MAGNITUDE)
        above = max(above, size if bits[at + i] >= 0 else np.int32(0))
        below = max(below, size if bits[at + i] < 0 else np.int32(0))
    pattern[0], pattern[1] = above, below
    return (top[0] if above > below else -top[1]) / -numbers.edge  # type: ignore[no-any-return]


@compiled(fastmath=frozenset({"contract", "reassoc", "nsz"}))
def _penalty(weight: Array, second: Array, at: int, n: int, scale: float, numbers: Any, force: Array, mark: Array, to: int) -> Any:
    """Write the penalty's gradient at a fixed scale and the weights on the edge, in units of the scale; return two sums over them."""
    strength, low, high, border, tolerance = scale * numbers.pull, numbers.low, numbers.high, numbers.border, numbers.tolerance
    lift = LIFT if abs(scale) < SMALLEST else ONE  # the reciprocal of a smaller scale overflows
    inverse = ZERO if scale == ZERO else ONE / (scale * lift)
    total, norm = ZERO, ZERO
    for i in range(n):
        units = weight[at + i] * lift * inverse
        units = low if units < low else units
        units = high if units > high else units
        code = np.rint(units)
        rest = units - code
        free = ZERO if abs(rest) <= tolerance else ONE
        rest *= free
        curvature = second[at + i] * strength
        slope = math.copysign(free, rest) - TWO * rest
        edge = units if abs(units) > border else ZERO
        total += (abs(rest) - code * slope) * curvature
        norm += edge * edge
        force[to + i] = slope * curvature
        mark[to + i] = edge
    return total, norm


@compiled()
def _shared(total: float, norm: float, numbers: Any) -> float:
    """Return what each unit on the edge of the grid gets of the derivative through the scale."""
    return numbers.through * np.float32(total / max(norm, 0.5))  # type: ignore[no-any-return]


@compiled()
def _share(force: Array, mark: Array, to: int, part: float, second: Array, at: int, n: int, numbers: Any) -> None:
    """Add to the weights on the edge what goes through the scale, and bound the whole."""
    spread, least = numbers.spread, numbers.least
    for i in range(n):
        pulls = _fused(mark[to + i], part, force[to + i])
        most = math.sqrt(second[at + i] * spread) + least
        pulls = most if pulls > most else pulls
        force[to + i] = -most if pulls < -most else pulls


@compiled()
def _adamw(weight: Array, grad: Array, first: Array, second: Array, force: Array, at: int, n: int, numbers: Any, pushes: bool) -> None:
    sign, decay, mix, blends, gain, keep = numbers.sign, numbers.decay, numbers.mix, numbers.blend != ZERO, numbers.gain, numbers.keep
    root, eps, rate, factor = numbers.root, numbers.eps, numbers.rate, numbers.factor
    for i in range(n):
        g, m = grad[at + i] * sign, first[at + i]
        if pushes:
            m = _fused(force[i], factor, m)
        m = _fused(mix, g - m, g if blends else m)
        v = _fused(gain * g, g, second[at + i] * keep)
        first[at + i] = m
        second[at + i] = v
        weight[at + i] = weight[at + i] * decay + rate * m / (math.sqrt(v) / root + eps)


@compiled()
def _round_to_grid(shown: Array, weight: Array, at: int, n: int, scale: float, numbers: Any) -> None:
    low, high, divisor = numbers.low, numbers.high, INFINITE if scale == ZERO else scale
    for i in range(n):
        units = np.rint(weight[at + i] / divisor)
        units = low if units < low else units
        units = high if units > high else units
        shown[at + i] = units * scale


@compiled()
def _part(weight: Array, second: Array, begin: int, block: int, scale: float, numbers: Any, force: Array, mark: Array) -> float:
    """Return what each unit on the edge gets of the derivative through the scale, for a block that is longer than a chunk."""
    total, norm, piece = 0.0, 0.0, np.uint64(CHUNK)
    if numbers.through != ZERO:
        for to in range(START, block, piece):
            one, two = _penalty(weight, second, begin + to, min(piece, block - to), scale, numbers, force, mark, START)
            total, norm = total + one, norm + two
    return _shared(total, norm, numbers)  # type: ignore[no-any-return]


@compiled(types.void(*[FLOATS] * 6, *[types.int64] * 3, types.Array(from_dtype(NUMBERS), 1, "C")))
def step(
    shown: Array, weight: Array, grad: Array, first: Array, second: Array, scales: Array, start: int, stop: int, block: int, given: Array
) -> None:
    """Step the blocks `start` to `stop`. Without elements in `shown` nothing is rounded; with `scales`, one per block, none is fitted."""
    numbers, bits, length, piece = given[0], weight.view(np.int32), np.uint64(block), np.uint64(CHUNK)
    pushes, force, mark, top = numbers.pull != ZERO, np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(2, np.float32)
    pattern = top.view(np.int32)
    most = np.uint64(max(1, CHUNK // block))
    for row in range(np.uint64(start), np.uint64(stop), most):
        end = min(row + most, np.uint64(stop))
        begin = row * length
        if block <= CHUNK:  # some whole blocks fit a chunk
            if pushes:
                for k in range(row, end):
                    at, to = k * length, k * length - begin
                    scale = scales[k] if scales.size else _fitted(bits, k * length, length, numbers, pattern, top)
                    total, norm = _penalty(weight, second, at, length, scale, numbers, force, mark, to)
                    _share(force, mark, to, _shared(total, norm, numbers), second, at, length, numbers)
            _adamw(weight, grad, first, second, force, begin, (end - row) * length, numbers, pushes)
        else:  # pieces of one block
            scale, part = ZERO, ZERO
            if pushes:
                scale = scales[row] if scales.size else _fitted(bits, begin, length, numbers, pattern, top)
                part = _part(weight, second, begin, length, scale, numbers, force, mark)
            for done in range(START, length, piece):
                at, n = begin + done, min(piece, length - done)
                if pushes:
                    _penalty(weight, second, at, n, scale, numbers, force, mark, START)
                    _share(force, mark, START, part, second, at, n, numbers)
                _adamw(weight, grad, first, second, force, at, n, numbers, pushes)
        if shown.size:
            for k in range(row, end):
                scale = scales[k] if scales.size else _fitted(bits, k * length, length, numbers, pattern, top)
                _round_to_grid(shown, weight, k * length, length, scale, numbers)
