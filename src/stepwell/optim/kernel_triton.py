"""The loops of kernel.c in Triton, for CUDA: one program steps some whole blocks, which stay in registers between all that is done to them.

Same order of operations as kernel.c, but for sums over a block and for products and sums that a GPU makes one instruction of; square roots
and quotients are rounded as IEEE says. A NaN stays where it is instead of making its block NaN. Checked against float64 in Triton's
interpreter, and compiled for a GPU without one; no GPU has run it, so that nothing chooses it by itself (see `engines`). Triton reads its
functions' annotations as code: they may name `tl` alone.
"""

from typing import Any

import triton
import triton.language as tl

LONGEST = 1 << 13  # elements of a block: eight arrays of it fill the registers of a program
TILE = 1 << 10  # elements of a program that steps several blocks
WARPS = 4


def step(arrays: Any, rows: int, block: int, numbers: Any) -> None:
    """Step all blocks of contiguous float32 tensors; `arrays` as in `engines.Arrays`, `numbers` as `task.numbers_of` returns them."""
    given = dict(zip(numbers.dtype.names, numbers[0].item(), strict=True))
    blends, pushes, full = (bool(given.pop(name)) for name in ("blend", "pull", "full"))
    width = triton.next_power_of_2(block)
    many = max(1, TILE // width)
    missing = arrays.weight  # a pointer that is never followed
    _step[(triton.cdiv(rows, many),)](
        missing if arrays.shown is None else arrays.shown,
        arrays.weight,
        arrays.grad,
        arrays.first,
        arrays.second,
        missing if arrays.scales is None else arrays.scales,
        rows,
        pull=float(numbers[0]["pull"]),
        **given,
        BLOCK=block,
        WIDTH=width,
        ROWS=many,
        BLENDS=blends,
        PUSHES=pushes,
        FULL=full,
        SHOWS=arrays.shown is not None,
        HELD=arrays.scales is not None,
        num_warps=WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _nearest(units):
    """Return the nearest integers, ties to even: float32 has no digits behind the point from 2^23 on."""
    return (units + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _clamped(units, low, high):
    """Return units inside the grid; a NaN stays one."""
    units = tl.where(units < low, low, units)
    return tl.where(units > high, high, units)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fitted(weight, edge, FULL: tl.constexpr):
    """Return the scale of every block, `(ROWS, 1)`; places beyond a block hold zeros."""
    if FULL:
        above, below = tl.max(weight, 1), tl.min(weight, 1)
        return tl.div_rn(tl.where(above > -below, above, below), tl.zeros_like(above) - edge)[:, None]
    top = tl.max(tl.abs(weight), 1)
    return tl.div_rn(top, tl.zeros_like(top) + edge)[:, None]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _force(weight, second, scale, pull, spread, least, through, low, high, border, tolerance):
    """Return the penalty's gradient with what goes through the scale, bounded."""
    lift = tl.where(tl.abs(scale) < 1.1754943508222875e-38, 1.2676506002282294e30, 1.0)  # the reciprocal of a smaller scale overflows
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(tl.zeros_like(scale) + 1.0, tl.where(scale == 0, 1.0, scale * lift)))
    units = _clamped(weight * lift * inverse, low, high)
    code = _nearest(units)
    rest = units - code
    free = tl.where(tl.abs(rest) <= tolerance, 0.0, 1.0)
    rest = rest * free
    curvature = second * (scale * pull)
    slope = tl.where(rest < 0, -free, free) - 2.0 * rest
    edge = tl.where(tl.abs(units) > border, units, 0.0)
    total = tl.sum((tl.abs(rest) - code * slope) * curvature, 1)
    norm = tl.sum(edge * edge, 1)
    part = through * tl.div_rn(total, tl.where(norm < 0.5, 0.5, norm))
    most = tl.sqrt_rn(second * spread) + least
    force = slope * curvature + edge * part[:, None]
    force = tl.where(force > most, most, force)
    return tl.where(force < -most, -most, force)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _step(
    shown, weight, grad, first, second, scales, rows,
    sign, decay, mix, gain, keep, root, eps, rate, pull, factor, spread, least,
    through, low, high, edge, border, tolerance,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLENDS: tl.constexpr, PUSHES: tl.constexpr, FULL: tl.constexpr,
    SHOWS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Step some blocks: penalty, moments, weight, rounded copy."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    place = row[:, None] * BLOCK + column[None, :]
    here = (row < rows)[:, None] & (column < BLOCK)[None, :]
    w = tl.load(weight + place, mask=here, other=0.0)
    g = tl.load(grad + place, mask=here, other=0.0) * sign
    m = tl.load(first + place, mask=here, other=0.0)
    v = tl.load(second + place, mask=here, other=0.0)
    if PUSHES:
        scale = tl.load(scales + row, mask=row < rows, other=1.0)[:, None] if HELD else _fitted(w, edge, FULL)
        m = _force(w, v, scale, pull, spread, least, through, low, high, border, tolerance) * factor + m
    m = mix * (g - m) + (g if BLENDS else m)
    v = gain * g * g + v * keep
    w = w * decay + tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps)
    tl.store(first + place, m, mask=here)
    tl.store(second + place, v, mask=here)
    tl.store(weight + place, w, mask=here)
    if SHOWS:
        scale = tl.load(scales + row, mask=row < rows, other=1.0)[:, None] if HELD else _fitted(w, edge, FULL)
        units = tl.where(scale == 0, 0.0, tl.div_rn(w, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(w)))
        tl.store(shown + place, _nearest(_clamped(units, low, high)) * scale, mask=here)
