"""Scale search: scales that lose less than absmax, because a few clipped weights may cost less than a coarse grid for all.

Where every assignment of codes can be visited, the best scale is found exactly (see `exact_scale`). Elsewhere every block tries factors of
its absmax scale, then the least-squares scale for the codes that the best one gave; what is better is kept.
Symbols: g = curvature, s = scale, v = grid values; the loss is sum g (w - q(w))^2, and s = sum g w v / sum g v^2 is best for given v.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stepwell import grids
from stepwell.blocks import scale_shape, to_blocks
from stepwell.ptq.exact_scale import exact_scale, has_exact_scale
from stepwell.quantizers import Quantizer, check_weight
from stepwell.scales import Fit

# largest first, so that ties keep the widest grid; the best factor of a ternary grid on a large Gaussian tensor is near 0.3
FACTORS = tuple(1 - k / 80 for k in range(65))
ROUNDS = 3  # of least squares: each is a local improvement


def scale_search(weight: Tensor, quantizer: Quantizer, curvature: Tensor | None = None) -> Tensor:
    """Return scales with which rounding to nearest loses little: `quantizer(weight, scale=scale)`.

    Args:
        weight: `(*shape)`.
        quantizer: the grid; its own scale rule is not used. Grids with levels "full" try both signs of the scale. In e4m3 the largest scale
            of the tensor stays, because all others are stored relative to it.
        curvature: `(*shape)`, how much a squared error of each weight costs, 0 or more; None is 1 everywhere. A block without any is
            searched as if it had 1.

    Returns:
        `(rows, blocks per row)` scales, exactly representable in the quantizer's scale dtype.

    Raises:
        TypeError: a weight or curvature of another kind than float tensors.
        ValueError: a weight or curvature that is not finite, a curvature of another shape or negative.

    >>> from stepwell.presets import int2
    >>> w = torch.tensor([[1.0, 0.5, 0.5, 0.5]])
    >>> scale_search(w, int2(block=4)), scale_search(w, int2(block=4), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    (tensor([[0.6250]]), tensor([[1.]]))
    """
    blocks, _, _ = quantizer.prepare(weight)
    cost = _cost(weight, curvature, quantizer, blocks)
    if has_exact_scale(blocks, quantizer):
        return exact_scale(weight, quantizer, curvature)
    start = replace(quantizer, rule="absmax", scale_dtype="fp32", scale_rounding="nearest").prepare(weight)[1].scale
    # squares of tiny or huge weights neither under- nor overflow in units of the absmax scale
    unit, shape = start.abs().masked_fill(start == 0, 1), scale_shape(tuple(weight.shape), quantizer.block, quantizer.axis)

    def attempt(scale: Tensor) -> tuple[Tensor, Fit]:
        """Return each block's loss `(blocks, 1)` with these scales as they are stored."""
        if quantizer.scale_dtype == "e4m3":
            scale = torch.where(start.abs() == start.abs().max(), start, scale.clamp(-start.abs().max(), start.abs().max()))
        fit = quantizer.prepare(weight, scale.reshape(shape))[1]
        return (cost * ((quantizer.snap(blocks, fit) - blocks) / unit).square_()).sum(1, keepdim=True), fit

    least, best = attempt(start)
    signs = (1.0, -1.0) if quantizer.format.levels == "full" else (1.0,)
    for factor in (sign * factor for factor in FACTORS for sign in signs):
        least, best = _better(least, best, *attempt(start * factor))
    for _ in range(ROUNDS):
        least, best = _better(least, best, *attempt(_least_squares(blocks, cost, quantizer, best)))
    return best.scale.reshape(shape)


def _cost(weight: Tensor, curvature: Tensor | None, quantizer: Quantizer, blocks: Tensor) -> Tensor:
    """Return what a squared error costs, `(blocks, block)`, scaled to a mean of 1 per block."""
    if curvature is None:
        return torch.ones_like(blocks)
    check_weight(curvature, "curvature")
    if curvature.shape != weight.shape:
        raise ValueError(f"`curvature` must have the weight's shape {tuple(weight.shape)}: got {tuple(curvature.shape)}.")
    if bool((curvature < 0).any()):
        raise ValueError(f"`curvature` must be 0 or more: got {curvature.min().item()}.")
    cost = to_blocks(curvature.detach().to(blocks), quantizer.block, quantizer.axis)
    mean = cost.mean(1, keepdim=True)
    return torch.where(mean > 0, cost / mean.masked_fill(mean == 0, 1), 1.0)


def _better(least: Tensor, best: Fit, loss: Tensor, fit: Fit) -> tuple[Tensor, Fit]:
    """Return the smaller loss of each block and its fit; the first of equals."""
    better = loss < least
    parts = (None if a is None or b is None else torch.where(better, b, a) for a, b in zip(best, fit, strict=True))
    return torch.where(better, loss, least), Fit(*parts)  # type: ignore[arg-type]


def _least_squares(blocks: Tensor, cost: Tensor, quantizer: Quantizer, fit: Fit) -> Tensor:
    """Return the best scale for the codes that a fit gives, `(blocks, 1)`; the fit's own where there is none of the right sign."""
    levels = grids.round_nearest(fit.to_units(blocks), quantizer.format)
    levels = levels if fit.zero is None else levels - fit.zero
    wanted = blocks if fit.minimum is None else blocks - fit.minimum
    below = (cost * levels * levels).sum(1, keepdim=True)
    found = (cost * levels * wanted).sum(1, keepdim=True) / below.masked_fill(below == 0, 1)
    keep = (below == 0) | ~found.isfinite()
    if quantizer.format.levels != "full":
        keep |= found < 0
    return torch.where(keep, fit.scale, found)
