"""Scale rules: from a block of weights to the scale that is stored for it.

A fitted scale is always a value that its scale dtype can hold, and refitting rounded weights gives the same scale again (bit for bit with
absmax on signed grids), so that quantizing twice changes nothing.

Sources: OCP MX v1.0 section 6.3 for the floor rule; the round-up rules are ours (LOTION needs a grid that never saturates: randomized
rounding is unbiased only inside the grid).
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stepwell import grids
from stepwell.formats import E8M0, FP8_E4M3, Format

ScaleDtype = Literal["fp32", "fp16", "bf16", "e8m0", "e4m3"]
ScaleRounding = Literal["nearest", "up", "floor"]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Shrink factors tried by the mse rule, largest first so that ties keep the widest grid; 1 is among them, which makes the rule idempotent.
SHRINK = tuple(1 - 0.65 * k / 52 for k in range(53))


class Fit(NamedTuple):
    """What maps blocks to grid units: `units = weight / scale + zero`, or `(weight - minimum) / scale`.

    Attributes:
        scale: `(blocks, 1)` final scales in weight units; negative where the levels are "full" and the largest weight is positive.
        zero: `(blocks, 1)` integer zero points in codes, or None.
        minimum: `(blocks, 1)` weight of code 0, or None; never together with `zero`.
    """

    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None

    def to_units(self, blocks: Tensor) -> Tensor:
        """Return `(blocks, block)` weights in grid units; a zero scale maps everything to zero."""
        divisor = self.scale.masked_fill(self.scale == 0, torch.inf)
        if self.minimum is not None:
            return (blocks - self.minimum) / divisor
        units = blocks / divisor
        return units if self.zero is None else units.add_(self.zero)

    def to_weights(self, units: Tensor) -> Tensor:
        """Return `(blocks, block)` grid units as weights."""
        if self.minimum is not None:
            return units * self.scale + self.minimum
        return (units if self.zero is None else units - self.zero) * self.scale

    def rows(self, start: int, stop: int) -> "Fit":
        """Return the fit of some of the blocks."""
        return Fit(*(None if part is None else part[start:stop] for part in self))  # type: ignore[arg-type]


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each block's lowest and highest weight, `(blocks, 1)` both."""
    low, high = torch.aminmax(blocks, dim=1, keepdim=True)
    return low, high


def absmax(low: Tensor, high: Tensor, format: Format) -> Tensor:
    """Return the unrounded scale `(blocks, 1)` that puts a block's largest weight on the edge of the grid.

    "full" grids have one more level below zero: the weight of largest magnitude goes there, and the scale takes the sign for it.
    "affine" grids spread from the lowest to the highest weight, zero included.
    """
    if format.levels == "affine":
        return (high.clamp(min=0) - low.clamp(max=0)) / format.high
    if format.levels == "full":
        return torch.where(high > -low, high, low) / -format.edge
    return torch.maximum(high, -low) / format.edge


def settle(scale: Tensor, format: Format) -> Tensor:
    """Return the scale moved by at most an ulp, so that refitting the rounded block returns it to the last bit.

    `(s * q) / q` in floating point is a fixed point of itself; s alone need not be.
    """
    return scale if format.levels in ("full", "affine") else scale * format.edge / format.edge


def store(scale: Tensor, dtype: ScaleDtype, rounding: ScaleRounding) -> Tensor:
    """Return scales `(blocks, 1)` rounded to what `dtype` can hold, as values of the scale's own dtype.

    "fp32" leaves them alone: float64 weights keep float64 scales. Scales beyond the largest value saturate. For e4m3 the caller divides
    by the tensor scale first.
    """
    if dtype == "fp32":
        return scale
    if dtype == "e8m0":
        return _power_of_two(scale, rounding)
    if dtype == "e4m3":
        return _up(scale, FP8_E4M3) if rounding == "up" else grids.round_nearest(scale, FP8_E4M3)
    limit = torch.finfo(TORCH_DTYPES[dtype]).max
    return scale.clamp(-limit, limit).to(TORCH_DTYPES[dtype]).to(scale.dtype)


def tensor_scale(largest: Tensor, format: Format) -> Tensor:
    """Return the scale of the scales, 0-dim, that puts the tensor's largest weight (0-dim, >= 0) on e4m3's highest value."""
    top = FP8_E4M3.high * format.edge
    return largest / top * top / top


def zero_point(low: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Return the integer code `(blocks, 1)` that stands for zero in an "affine" grid whose lowest weight is `low`."""
    divisor = scale.masked_fill(scale == 0, torch.inf)
    return (low.clamp(max=0) / divisor).neg_().round_().clamp_(0, format.high)


def _power_of_two(scale: Tensor, rounding: ScaleRounding) -> Tensor:
    """Round positive scales to a power of two that e8m0 holds, up or down; zero stays."""
    mantissa, exponent = torch.frexp(scale.abs())
    if rounding == "up":
        # a relative 2**-20 of slack keeps a product of powers of two from being pushed one octave up by float error
        exponent = exponent - (mantissa <= 0.5 * (1 + 2**-20)).to(exponent.dtype)
    else:
        exponent = exponent - 1
    power = torch.ldexp(torch.ones_like(scale), exponent.clamp(-127, 127))
    return torch.where(scale == 0, torch.zeros_like(scale), power * scale.sign())


def _up(scale: Tensor, format: Format) -> Tensor:
    """Round non-negative scales up to the next value of a float format; a relative 2**-20 above a value counts as that value."""
    values = _positive(format, scale.dtype, scale.device)
    return values[torch.bucketize(scale * (1 - 2**-20), values).clamp_(max=len(values) - 1)]


@cache
def _positive(format: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([value for value in format.values if value >= 0], dtype=dtype, device=device)


def scale_format(dtype: ScaleDtype) -> Format | None:
    """Return the grid that a narrow scale dtype stands for; None for IEEE types."""
    return {"e8m0": E8M0, "e4m3": FP8_E4M3}.get(dtype)
