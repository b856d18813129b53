"""Presets: the quantizers people ask for by name."""

from dataclasses import replace
from typing import Literal

import torch

from stepwell.blocks import Block
from stepwell.formats import FP4_E2M1, FP8_E4M3, FP8_E5M2, TERNARY, Format, Levels, integer
from stepwell.quantizers import Compute, Quantizer
from stepwell.scales import TORCH_DTYPES, Rule, ScaleDtype, ScaleRounding


def intn(
    bits: int,
    *,
    block: Block = 32,
    scale: Rule = "absmax",
    scale_dtype: ScaleDtype = "fp32",
    levels: Levels | None = None,
    axis: int | None = None,
    compute: Compute = None,
) -> Quantizer:
    """Return an integer grid of `bits` bits.

    Args:
        bits: 2..8.
        block: elements per scale along the contraction dimension, "channel", or None for one scale per tensor.
        scale: "absmax", "mse" (searched), or a positive number: the scale itself, within the normal range of its dtype.
        scale_dtype: "fp32", "fp16", "bf16", "e8m0" (a power of two, rounded up) or "e4m3" (rounded up, with a tensor scale).
        levels: "symmetric" -q..q, "full" -(q+1)..q with a signed scale, "mid" half-odd codes without a zero, "affine" with a zero point.
            None is "symmetric", where `quantize_training` may choose better.
        axis: the contraction dimension where it is not the usual one.
        compute: "bf16" or "fp16" where the runtime rounds `scale * code` to that dtype.

    Raises:
        ValueError: any of these outside what is listed.

    >>> print(intn(4, block=128, scale_dtype="fp16", levels="full"))
    int4/full block 128, absmax fp16 scales
    """
    built = _build(integer(bits, levels or "symmetric"), block, scale, scale_dtype, axis, compute)
    return replace(built, levels_open=True) if levels is None else built


def int2(*, block: Block = 32, scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32", levels: Levels | None = None) -> Quantizer:
    """Return `intn(2, ...)`: three levels if symmetric, four if "full" or "mid"."""
    return intn(2, block=block, scale=scale, scale_dtype=scale_dtype, levels=levels)


def int3(*, block: Block = 32, scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32", levels: Levels | None = None) -> Quantizer:
    """Return `intn(3, ...)`."""
    return intn(3, block=block, scale=scale, scale_dtype=scale_dtype, levels=levels)


def int4(*, block: Block = 32, scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32", levels: Levels | None = None) -> Quantizer:
    """Return `intn(4, ...)`."""
    return intn(4, block=block, scale=scale, scale_dtype=scale_dtype, levels=levels)


def int8(*, block: Block = 32, scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32", levels: Levels | None = None) -> Quantizer:
    """Return `intn(8, ...)`."""
    return intn(8, block=block, scale=scale, scale_dtype=scale_dtype, levels=levels)


def ternary(*, block: Block = 32, scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32") -> Quantizer:
    """Return the grid -1, 0, 1."""
    return _build(TERNARY, block, scale, scale_dtype, None, None)


def fp4(*, block: Block = 32, scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32", compute: Compute = None) -> Quantizer:
    """Return fp4_e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign) under a scale of your choice; see also `mxfp4` and `nvfp4`."""
    return _build(FP4_E2M1, block, scale, scale_dtype, None, compute)


def fp8(
    *, kind: Literal["e4m3", "e5m2"] = "e4m3", block: Block = "channel", scale: Rule = "absmax", scale_dtype: ScaleDtype = "fp32"
) -> Quantizer:
    """Return fp8 e4m3 (largest 448) or e5m2 (largest 57344), scaled so that the block's largest weight sits on the largest value."""
    if kind not in ("e4m3", "e5m2"):
        raise ValueError(f"`kind` must be 'e4m3' or 'e5m2': got {kind!r}.")
    return _build(FP8_E4M3 if kind == "e4m3" else FP8_E5M2, block, scale, scale_dtype, None, None)


def mxfp4(*, rule: Literal["ceil", "floor"] = "ceil", compute: Compute = None) -> Quantizer:
    """Return MXFP4: fp4_e2m1 in blocks of 32 under a power-of-two scale (e8m0).

    Args:
        rule: "ceil" takes the smallest power of two that does not saturate; "floor" is the OCP rule, under which the largest weights of
            some blocks lie outside the grid and randomized rounding is biased there.
        compute: as in `intn`.
    """
    if rule not in ("ceil", "floor"):
        raise ValueError(f"`rule` must be 'ceil' or 'floor': got {rule!r}.")
    return Quantizer(FP4_E2M1, 32, "absmax", "e8m0", "up" if rule == "ceil" else "floor", compute=compute)


def nvfp4(*, compute: Compute = None) -> Quantizer:
    """Return NVFP4: fp4_e2m1 in blocks of 16 under e4m3 scales, rounded up, and one float32 scale per tensor."""
    return Quantizer(FP4_E2M1, 16, "absmax", "e4m3", "up", compute=compute)


def _build(format: Format, block: Block, scale: Rule, scale_dtype: ScaleDtype, axis: int | None, compute: Compute) -> Quantizer:
    """Return the quantizer; narrow scales are rounded up, so that nothing saturates, except after a search, which saturates by design."""
    rounding: ScaleRounding = "nearest"
    if scale_dtype == "e8m0" or (scale_dtype == "e4m3" and scale != "mse"):
        rounding = "up"
    quantizer = Quantizer(format, block, scale, scale_dtype, rounding, axis=axis, compute=compute)
    if isinstance(quantizer.rule, float):
        _check_fixed(quantizer.rule, format, scale_dtype)
    return quantizer


def _check_fixed(scale: float, format: Format, dtype: ScaleDtype) -> None:
    """Refuse a fixed scale that its dtype would saturate, flush to zero or hold with few bits."""
    if dtype == "e8m0":
        low, high = 2.0**-127, 2.0**127
    else:
        limits = torch.finfo(TORCH_DTYPES.get(dtype, torch.float32))
        low, high = limits.smallest_normal, limits.max
    if dtype == "e4m3":  # the float32 scale of the scales is `scale / 448`, reached by way of `scale * edge`
        low, high = low * FP8_E4M3.high, high / format.edge
    if not low <= scale <= high:
        raise ValueError(
            f"`scale` must lie in the normal range of {dtype} scales, {low:.3g} to {high:.3g}: got {scale:g}. "
            "Choose another `scale_dtype`, or scale='absmax' to fit it to the weights."
        )
