"""Scale rules: from a block of weights to the scale that is stored for it.

A fitted scale is always a value that its scale dtype can hold, and storing it again changes nothing: what `scale()` returns can be given
back. Where the block's largest weight rounds to the edge of the grid, refitting the rounded block returns the scale to the last bit, so
that quantizing twice changes nothing either.

Sources: OCP MX v1.0 section 6.3 for the floor rule; the round-up rules are ours (LOTION needs a grid that never saturates: randomized
rounding is unbiased only inside the grid).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stepwell import grids
from stepwell.formats import FP8_E4M3, Format

ScaleDtype = Literal["fp32", "fp16", "bf16", "e8m0", "e4m3"]
ScaleRounding = Literal["nearest", "up", "floor"]
Rule = Literal["absmax", "mse"] | float
Zero = Literal["integer", "minimum"]
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

    def trial(self, chosen: int | Tensor) -> "Fit":
        """Return one fit of several, `(trials, blocks, 1)`: the same for all blocks, or of `(blocks, 1)` indices."""

        def one(part: Tensor | None) -> Tensor | None:
            if part is None or part.ndim < 3:  # what all trials share
                return part
            return part[chosen] if isinstance(chosen, int) else part.take_along_dim(chosen[None], 0)[0]

        return Fit(*map(one, self))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: "Sequence[Fit]") -> "Fit":
        """Return the fit of all blocks of several fits, in their order."""
        return Fit(*(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)))  # type: ignore[arg-type]


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each block's lowest and highest weight, `(blocks, 1)` both."""
    return blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)  # four times as fast as torch.aminmax along short rows


def absmax(low: Tensor, high: Tensor, format: Format, *, rounding: ScaleRounding = "nearest", zero: Zero = "integer") -> Tensor:
    """Return the unrounded scale `(blocks, 1)` that puts a block's largest weight on the edge of the grid.

    "full" grids have one more level below zero: the weight of largest magnitude goes there, and the scale takes the sign for it.
    "affine" grids spread from the lowest to the highest weight, zero included where it is a code. The floor rule of MX measures a block
    by the highest power of two on the grid instead of by the edge.
    """
    if format.levels == "affine":
        reach = high - low if zero == "minimum" else high.clamp(min=0) - low.clamp(max=0)
        return reach.clamp_(max=torch.finfo(reach.dtype).max) / format.high  # finite weights can lie infinitely far apart
    if format.levels == "full":
        return torch.where(high > -low, high, low) / -format.edge
    edge = 2.0 ** math.floor(math.log2(format.edge)) if rounding == "floor" else format.edge
    return torch.maximum(high, -low) / edge


def settle(scale: Tensor, format: Format) -> Tensor:
    """Return the scale moved by at most an ulp, so that refitting the rounded block returns it to the last bit.

    Any quotient t = m / edge has (t * edge) / edge = t in binary floating point; an arbitrary scale has it only after one round trip.
    """
    return scale if format.levels in ("full", "affine") else scale * format.edge / format.edge


def store(scale: Tensor, dtype: ScaleDtype, rounding: ScaleRounding) -> Tensor:
    """Return scales `(blocks, 1)` rounded to what `dtype` can hold, as values of the scale's own dtype.

    "fp32" leaves them alone: float64 weights keep float64 scales. Scales beyond the largest value saturate; e8m0 has no zero, so there a
    zero becomes the smallest power of two. For e4m3 the caller divides by the tensor scale first.
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
    """Return the scale of the scales, 0-dim, that puts the tensor's largest scale (0-dim, >= 0) on e4m3's highest value.

    It is settled like a scale, through both products (by the highest e4m3 value, then by the edge of the grid), so that it follows to the
    last bit from the rounded weights and from the stored scales. Two rounds reach the fixed point for every float32; a third is margin.
    """
    for _ in range(3):
        largest = largest / FP8_E4M3.high * FP8_E4M3.high * format.edge / format.edge
    return largest / FP8_E4M3.high


def zero_point(low: Tensor, high: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Return the integer code `(blocks, 1)` that stands for zero in an "affine" grid.

    It puts the middle of the grid on the middle of the weights (zero included), which is `-low / scale` wherever the grid spans them
    exactly, and clips both sides alike where a searched scale is narrower.
    """
    divisor = scale.masked_fill(scale == 0, torch.inf)
    middle = (low.clamp(max=0) + high.clamp(min=0)) / 2
    return (format.high / 2 - middle / divisor).round_().clamp_(0, format.high)


def _power_of_two(scale: Tensor, rounding: ScaleRounding) -> Tensor:
    """Round positive scales to a power of two that e8m0 holds, up or down; zero becomes the smallest."""
    mantissa, exponent = torch.frexp(scale)
    if rounding == "up":
        # a relative 2**-20 of slack keeps a product of powers of two from being pushed one octave up by float error
        exponent = exponent - (mantissa <= 0.5 * (1 + 2**-20)).to(exponent.dtype)
    else:
        exponent = exponent - 1
    exponent = exponent.masked_fill(scale <= 0, -127).clamp_(-127, 127)
    return torch.ldexp(torch.ones_like(scale), exponent)


def _up(scale: Tensor, format: Format) -> Tensor:
    """Round scales away from zero to the next value of a float format; a relative 2**-20 beyond a value counts as that value."""
    return grids.round_up(scale.abs() * (1 - 2**-20), format).copysign(scale)


def check_rule(format: Format, rule: Rule, dtype: ScaleDtype, rounding: ScaleRounding, zero: Zero) -> None:
    """Refuse scale options that do not exist or do not go together.

    Raises:
        ValueError: any of them.
    """
    if isinstance(rule, bool) or not (rule in ("absmax", "mse") if isinstance(rule, str) else isinstance(rule, int | float)):
        raise ValueError(f"`scale` must be 'absmax', 'mse' or a positive number: got {rule!r}.")
    if not isinstance(rule, str) and not 0 < rule < math.inf:
        raise ValueError(f"`scale` as a number must be positive and finite: got {rule}.")
    if dtype not in get_args(ScaleDtype):
        raise ValueError(f"`scale_dtype` must be one of {', '.join(get_args(ScaleDtype))}: got {dtype!r}.")
    allowed = {"e8m0": ("up", "floor"), "e4m3": ("up", "nearest")}.get(dtype, ("nearest",))
    if rounding not in allowed:
        raise ValueError(f"`scale_rounding` of {dtype} scales must be {' or '.join(map(repr, allowed))}: got {rounding!r}.")
    if dtype == "e8m0" and format.levels == "full":
        raise ValueError(f"`scale_dtype` 'e8m0' has no sign, but {format} needs signed scales. Use levels='symmetric' or other scales.")
    if zero not in get_args(Zero):
        raise ValueError(f"`zero` must be 'integer' or 'minimum': got {zero!r}.")
    if zero == "minimum" and (format.levels != "affine" or dtype not in ("fp32", "fp16", "bf16") or rule == "mse"):
        raise ValueError(
            f"`zero='minimum'` needs levels='affine', 'absmax' or a number as scale, and fp32, fp16 or bf16 scales: got {format}, {rule}, "
            f"{dtype}. Use zero='integer'."
        )
