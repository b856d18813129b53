"""LOTION the slow way: the penalty as a differentiable function of the weights, and AdamW with the penalty in its first moment only.

Only the grid's numbers come from stepwell (its sorted values, and scales that are not differentiable); neighbours are searched in the list,
the derivative is autograd's.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}


def penalty(rows: Tensor, curvature: Tensor, quantizer, *, through_scale: bool = True) -> Tensor:
    """Return 1/2 sum g (x - lower)(upper - x) of `(blocks, block)` float64 rows, differentiable through place and scale."""
    scale, zero, minimum = scales(rows, quantizer)
    if not through_scale:
        scale, minimum = scale.detach(), minimum.detach()
    values = torch.tensor(quantizer.format.values, dtype=torch.float64)
    place = ((rows - minimum) / torch.where(scale == 0, torch.inf, scale) + zero).detach()
    inside = (place > values[0]) & (place < values[-1])
    index = torch.searchsorted(values, place.clamp(values[0], values[-1]), right=True).clamp(1, len(values) - 1)
    one, two = ((values[k] - zero) * scale + minimum for k in (index - 1, index))
    return (curvature * torch.where(inside, (rows - one) * (two - rows), 0.0)).sum() / 2


def scales(rows: Tensor, quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scale, zero point, minimum) of every row; differentiable where the rule is absmax and the scale dtype has a fine mantissa."""
    nothing = torch.zeros(len(rows), 1, dtype=rows.dtype)
    fit = quantizer.local().fit(rows.detach())
    zero = nothing if fit.zero is None else fit.zero
    if quantizer.rule != "absmax" or quantizer.scale_dtype in ("e8m0", "e4m3"):
        return fit.scale, zero, nothing if fit.minimum is None else fit.minimum
    high, low, levels = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True), quantizer.format.levels
    if levels == "affine" and quantizer.zero == "minimum":
        return stored((high - low) / quantizer.format.high, quantizer), zero, stored(low, quantizer)
    if levels == "affine":
        return stored((high.clamp(min=0) - low.clamp(max=0)) / quantizer.format.high, quantizer), zero, nothing
    if levels == "full":
        return stored(torch.where(high > -low, high, low) / quantizer.format.low, quantizer), zero, nothing
    return stored(rows.abs().amax(1, keepdim=True) / quantizer.format.high, quantizer), zero, nothing


def stored(scale: Tensor, quantizer) -> Tensor:
    """Return a scale rounded to its dtype with a straight-through gradient."""
    if quantizer.scale_dtype == "fp32":
        return scale
    return scale + (scale.detach().to(TORCH[quantizer.scale_dtype]).to(scale.dtype) - scale.detach())


def roundings(lower: Tensor, x: Tensor, upper: Tensor):
    """Yield (probability, rounded weight) for every one of the 2**n roundings of n weights."""
    odds = torch.where(upper > lower, (x - lower) / (upper - lower), 0.0)
    for ups in itertools.product((False, True), repeat=len(x)):
        up = torch.tensor(ups)
        yield torch.where(up, odds, 1 - odds).prod().item(), torch.where(up, upper, lower)


class AdamW:
    """AdamW written out, after Loshchilov and Hutter; the penalty's gradient enters the first moment and nothing else."""

    def __init__(self, weights: list[Tensor], lr: float, betas=(0.9, 0.999), eps: float = 1e-8, decay: float = 0.01):
        self.weights, self.lr, self.betas, self.eps, self.decay = weights, lr, betas, eps, decay
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]
        self.steps = 0

    def step(self, gradients: list[Tensor], force: Callable[[int, Tensor, Tensor], Tensor | float]) -> None:
        """Take one step; `force(index, weight, curvature)` is the penalty's gradient, asked for from the second step on."""
        (one, two), before = self.betas, self.steps
        self.steps += 1
        for k, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            extra = force(k, weight, self.second[k] / (1 - two**before)) if before else 0.0
            weight.mul_(1 - self.lr * self.decay)
            self.first[k] = one * self.first[k] + (1 - one) * (gradient + extra)
            self.second[k] = two * self.second[k] + (1 - two) * gradient**2
            hat, spread = self.first[k] / (1 - one**self.steps), self.second[k] / (1 - two**self.steps)
            weight.sub_(self.lr * hat / (spread.sqrt() + self.eps))
