"""Exact scale: the best scale and codes of a block, found by visiting every assignment of codes that any scale can give.

As the scale s falls from infinity, a weight changes its code where w / s crosses a threshold between two grid values, so a block of n
weights has at most n times the number of thresholds different assignments. Each is a parabola in s with its minimum at s = B / A.
Symbols: g = curvature, v = grid values, A = sum g v^2, B = sum g w v, loss(s) = sum g w^2 - 2 s B + s^2 A.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell import scales
from stepwell.blocks import scale_shape, to_blocks
from stepwell.formats import Format
from stepwell.quantizers import Quantizer

CHUNK = 1 << 22  # code changes that are sorted together


def exact_scale(weight: Tensor, quantizer: Quantizer, curvature: Tensor | None = None) -> Tensor:
    """Return the scales that minimise `sum curvature * (weight - quantizer(weight, scale=scale))^2`, exactly.

    Takes time and memory in proportion to elements times codes: for analysis. `scale_search` takes every grid, and this where it is cheap.

    Args:
        weight: `(*shape)`.
        quantizer: a grid without zero points, whose scales are stored in fp32, fp16, bf16 or e8m0; its own scale rule is not used.
        curvature: `(*shape)`, 0 or more; None is 1 everywhere.

    Returns:
        `(rows, blocks per row)` scales, exactly representable in the quantizer's scale dtype.

    Raises:
        ValueError: a grid with zero points, e4m3 scales (which all blocks share a factor of) or a compute dtype.
    """
    if not _one_parameter(quantizer):
        raise ValueError(f"`quantizer` must have one free scale per block and nothing else: got {quantizer}. Use `scale_search`.")
    blocks, fit, _ = quantizer.prepare(weight)
    cost = torch.ones_like(blocks) if curvature is None else to_blocks(curvature.to(blocks), quantizer.block, quantizer.axis)
    found = []
    step = max(1, CHUNK // (blocks.shape[1] * len(quantizer.format.values)))
    for start in range(0, len(blocks), step):
        part, g = blocks[start : start + step].double(), cost[start : start + step].double()
        loss, scale = _best(part, g, quantizer)
        if quantizer.format.levels == "full":
            mirrored_loss, mirrored = _best(-part, g, quantizer)
            scale = torch.where(mirrored_loss < loss, -mirrored, scale)
        # without curvature, or with zeros only, any scale is as good as the rule's
        found.append(torch.where((g * part * part).sum(1) > 0, scale, fit.scale[start : start + step, 0].double()))
    return torch.cat(found).to(blocks).reshape(scale_shape(tuple(weight.shape), quantizer.block, quantizer.axis))


def has_exact_scale(blocks: Tensor, quantizer: Quantizer) -> bool:
    """Say whether `exact_scale` applies to `(blocks, block)` and costs no more than trying some eighty scales: up to 16 grid values."""
    count = len(quantizer.format.values)
    return _one_parameter(quantizer) and count <= 16 and blocks.shape[1] * count <= CHUNK


def _one_parameter(quantizer: Quantizer) -> bool:
    """Say whether a block's rounding depends on its own scale and nothing else."""
    return quantizer.format.levels != "affine" and quantizer.scale_dtype != "e4m3" and quantizer.compute is None


class _Ladder(NamedTuple):
    """The values a weight of one sign passes as the scale falls, in size, and the thresholds between them."""

    values: Tensor
    thresholds: Tensor


def _best(blocks: Tensor, cost: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Return the least loss, without its constant, and its scale for every block, `(blocks,)` both; positive scales only."""
    size, rungs = blocks.abs(), [_ladder(quantizer.format, sign) for sign in (1, -1)]
    length = max(len(rung.thresholds) for rung in rungs)
    values = torch.stack([_pad(rung.values, length + 1) for rung in rungs]).to(blocks)[(blocks < 0).long()]
    limits = torch.stack([_pad(rung.thresholds, length) for rung in rungs]).to(blocks)[(blocks < 0).long()]
    order = (size[:, :, None] / limits).flatten(1).argsort(1, descending=True)

    def sums(start: Tensor, change: Tensor) -> Tensor:
        """Return the sum of each assignment, in the order in which the falling scale meets them."""
        first = start.sum(1, keepdim=True)
        return torch.cat([first, first + change.flatten(1).gather(1, order).cumsum(1)], dim=1)

    weighted = cost * size
    below = sums(cost * values[:, :, 0] ** 2, cost[:, :, None] * (values**2).diff(dim=2))
    above = sums(weighted * values[:, :, 0], weighted[:, :, None] * values.diff(dim=2))
    wanted = above / below.masked_fill(below <= 0, torch.inf)
    losses, found = [], []
    for scale in _storable(wanted, quantizer):
        loss = scale * (scale * below - 2 * above)
        best = loss.argmin(1, keepdim=True)
        losses.append(loss.gather(1, best)[:, 0])
        found.append(scale.gather(1, best)[:, 0])
    pick = torch.stack(losses).argmin(0, keepdim=True)
    return torch.stack(losses).gather(0, pick)[0], torch.stack(found).gather(0, pick)[0]


def _storable(wanted: Tensor, quantizer: Quantizer) -> tuple[Tensor, ...]:
    """Return what the scale dtype can hold next to the wanted scales; a parabola is symmetric, so the nearest value is the best."""
    if quantizer.scale_dtype == "e8m0":
        return tuple(scales.store(wanted, "e8m0", rounding) for rounding in ("up", "floor"))
    return (scales.store(wanted, quantizer.scale_dtype, "nearest"),)


def _ladder(format: Format, sign: int) -> _Ladder:
    """Return the values that `sign * w / s` passes as s falls, for a weight of that sign, starting next to zero."""
    ordered = sorted(sign * value for value in format.values)
    middles = [(a + b) / 2 for a, b in pairwise(ordered)]
    first = sum(middle <= 0 for middle in middles)
    return _Ladder(torch.tensor(ordered[first:], dtype=torch.float64), torch.tensor(middles[first:], dtype=torch.float64))


def _pad(row: Tensor, length: int) -> Tensor:
    """Return the row filled up with its last value; a threshold that repeats changes nothing, because the values repeat too."""
    return torch.cat([row, row[-1:].expand(length - len(row))])
