"""LOTION: train on the loss that randomized rounding has on average, in closed form to second order.

Source: Kwun et al., "LOTION: Smoothing the Optimization Landscape for Quantized Training" (arXiv:2510.08757), Eq. 3:
loss + strength/2 * sum_i g_i (x_i - lower_i)(upper_i - x_i), with g the diagonal of the Gauss-Newton matrix.
Symbols: g = curvature, s = scale, z = weight / s, r = z - round(z), f = slope of D (1 - D) with D the place of the weight in its cell.
Differs: g is Adam's bias-corrected second moment of the *task* gradient, times the loss terms averaged per step; the penalty feeds the
first moment only (fed to both it blows up), bounded by ten times the weight's own root mean square gradient (Adam would throw away a
block's largest weight if that has no curvature of its own); the scale is differentiated (the paper leaves this open; it is the most
valuable choice).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from stepwell import grids
from stepwell.blocks import from_blocks, to_blocks
from stepwell.formats import Format
from stepwell.methods.base import Context, Curvature, Method, WithCurvature, round_nearest
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.rounding import nearest, variance
from stepwell.scales import Fit
from stepwell.schedules import Schedule, scheduled


class Rows(NamedTuple):
    """What the penalty's gradient needs besides weights and curvature: the grid, its scales, a 0-dim factor, and which terms."""

    quantizer: Quantizer
    fit: Fit
    factor: Tensor
    through_scale: bool


@dataclass(frozen=True)
class Push:
    """What LOTION adds to the gradient of `(blocks, block)` rows; a record, so that a kernel can do the same in one pass."""

    strength: float
    through_scale: bool

    def __call__(self, weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
        """Return the penalty's gradient; held scales do not move."""
        factor = context.loss_terms * self.strength
        moves = self.through_scale and context.fit is None
        return penalty_force(weight, curvature, Rows(context.quantizer, context.fitted(weight), factor, moves))


def lotion(
    quantizer: Quantizer,
    *,
    strength: float | Schedule = 1.0,
    loss_terms: float | None = None,
    through_scale: bool = True,
    forward: Literal["latent", "nearest"] = "latent",
    curvature: Curvature | None = None,
) -> Method:
    """Return LOTION training on a grid.

    Args:
        quantizer: the grid.
        strength: of the penalty, in theory's unit: 1 is the smoothed loss itself. A number or a function of the step.
        loss_terms: loss terms averaged per optimizer step (batch times sequence for a language model): Adam's second moment is the squared
            *mean* gradient, that much smaller than the curvature. None: set `run.loss_terms` before
            the first step. Not used with `curvature=`.
        through_scale: differentiate the scale as well as the place in the cell.
        forward: "latent" trains on the latent weights; "nearest" on rounded ones with the straight-through gradient (STE + LOTION).
        curvature: mapping or function from parameter name to the curvature of the loss; None takes the optimizer's second moment.

    Raises:
        TypeError: `quantizer` is no Quantizer.
        ValueError: a strength or a count of loss terms that is negative or not finite, or an unknown `forward`.
    """
    check_quantizer(quantizer)
    if not callable(strength) and not (isinstance(strength, int | float) and math.isfinite(strength) and strength >= 0):
        raise ValueError(f"`strength` must be a finite number, 0 or more: got {strength!r}. Theory's value is 1.")
    if forward not in ("latent", "nearest"):
        raise ValueError(f"`forward` must be 'latent' or 'nearest': got {forward!r}.")
    if loss_terms is not None:
        check_terms(loss_terms)
    if curvature is not None and not isinstance(curvature, Mapping) and not callable(curvature):
        raise TypeError(f"`curvature` must be a mapping or a function from parameter name to a tensor: got {type(curvature).__name__}.")

    nearest_forward = forward == "nearest"
    return Method(
        quantizer,
        "ste + lotion" if nearest_forward else "lotion",
        deploy=round_nearest if nearest_forward else None,
        push=_annealed(through_scale) if callable(strength) else Push(strength, through_scale),
        curvature=curvature,
        loss_terms=loss_terms,
        schedules={"strength": scheduled("strength", strength)} if callable(strength) else {},
        unbiased=True,
        strength=strength,
    )


def _annealed(through_scale: bool) -> WithCurvature:
    """Return the same push with a strength that changes with the step."""

    def push(weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
        factor = context.loss_terms * context.scheduled["strength"]
        moves = through_scale and context.fit is None
        return penalty_force(weight, curvature, Rows(context.quantizer, context.fitted(weight), factor, moves))

    return push


def check_terms(loss_terms: float) -> None:
    """Raise unless the number of loss terms is positive and finite."""
    if isinstance(loss_terms, bool) or not isinstance(loss_terms, int | float) or not (math.isfinite(loss_terms) and loss_terms > 0):
        raise ValueError(f"`loss_terms` must be a positive number of loss terms per optimizer step: got {loss_terms!r}.")


def penalty(weight: Tensor, curvature: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the penalty `1/2 sum g (x - lower)(upper - x)`, 0-dim.

    Args:
        weight: `(*shape)`.
        curvature: `(*shape)`, the diagonal g, in loss per squared weight.
        quantizer: the grid.

    >>> from stepwell.presets import int2
    >>> penalty(torch.tensor([1.0, 0.5]), torch.ones(2), int2(block=None))
    tensor(0.1250)
    """
    return (curvature * variance(quantizer.bracket(weight))).sum() / 2


def penalty_gradient(weight: Tensor, curvature: Tensor, quantizer: Quantizer, through_scale: bool = True) -> Tensor:
    """Return the gradient of `penalty`, `(*shape)`, with the curvature held constant; exactly zero in-cell force on grid points.

    Args:
        weight, curvature, quantizer: as in `penalty`.
        through_scale: also differentiate the scale. Applies to absmax scales in fp32, fp16 and bf16 (rounding to fp16 or bf16 passes
            straight through); power-of-two and e4m3 scales are piecewise constant, so there is nothing to differentiate.
    """
    blocks, fit, _ = quantizer.prepare(weight)
    terms = to_blocks(curvature.to(blocks), quantizer.block, quantizer.axis)
    force = penalty_force(blocks, terms, Rows(quantizer, fit, torch.ones((), dtype=blocks.dtype), through_scale))
    return from_blocks(force, tuple(weight.shape), quantizer.block, quantizer.axis).to(weight.dtype)


def prox(weight: Tensor, curvature: Tensor, quantizer: Quantizer, strength: float = 1.0, lr: float | Tensor = 0.1) -> Tensor:
    """Return `argmin_u (u - weight)^2 / (2 lr) + strength * penalty(u)` inside each weight's cell, scale held fixed, `(*shape)`.

    Args:
        weight, curvature, quantizer: as in `penalty`.
        strength: raw factor of the penalty.
        lr: step size, a float or a tensor that broadcasts against the weight.

    The penalty is concave in the cell: with `c = strength lr g` below 1 the weight moves towards its nearest grid point by a factor, from 1
    on it snaps there.
    """
    bracket = quantizer.bracket(weight)
    factor = strength * lr * curvature.to(weight)
    inside = factor < 1
    ratio = torch.where(inside, factor / (1 - torch.where(inside, factor, 0.0)), 0.0)
    moved = bracket.x - ratio * (bracket.lower + bracket.upper - 2 * bracket.x) / 2
    return torch.where(inside, moved.clamp(bracket.lower, bracket.upper), nearest(bracket))


def penalty_force(weight: Tensor, curvature: Tensor, context: Rows) -> Tensor:
    """Return the gradient of the penalty for `(blocks, block)` rows, times `context.factor`; nothing is checked.

    Every line here is one pass over the weights in every training step, so scalars ride on the `(blocks, 1)` scales.
    """
    quantizer, fit = context.quantizer, context.fit
    units = fit.to_units(weight)
    slope, lift = _even_cells(units, quantizer.format, fit.zero) if quantizer.format.uniform else _cells(units, quantizer.format)
    pull = curvature * (fit.scale * (context.factor / 2))
    force = slope.mul_(pull)
    if not context.through_scale or quantizer.rule != "absmax" or quantizer.scale_dtype in ("e8m0", "e4m3"):
        return force
    total = lift.mul_(pull).sum(1, keepdim=True)
    drift = force.sum(1, keepdim=True) if fit.minimum is not None else None
    if quantizer.format.levels != "affine" and quantizer.scale_dtype == "fp32":
        return _to_edge(force, units, quantizer, total)
    return _to_extremes(force, weight, quantizer, total, drift)


def _even_cells(units: Tensor, format: Format, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the penalty does in the cells of a uniform grid, in units of `g s / 2`: its slope f, and its derivative by the scale.

    The latter is `2 (|r| - r^2) - z f`, which is `|r| - n f` at the code n = z - r. `units` are clamped in place.
    """
    units.clamp_(format.low, format.high)
    code = (units + format.shift).round_().sub_(format.shift) if format.shift else units.round()
    rest = hardshrink(units - code, tolerance(units.dtype, format))  # on the grid to rounding error is on the grid: no force at all
    slope = rest.sign().sub_(rest, alpha=2)
    return slope, rest.abs_().addcmul_(code if zero is None else code.sub_(zero), slope, value=-1)


def _cells(units: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the same for the cells of a float grid, whose widths differ."""
    lower, inside, upper, _ = grids.bracket(units, format)
    free = torch.minimum(inside - lower, upper - inside) > tolerance(units.dtype, format)
    slope = (lower + upper - 2 * inside) * free
    return slope, (2 * (inside - lower)).mul_(upper - inside).mul_(free).addcmul_(inside, slope, value=-1)


def tolerance(dtype: torch.dtype, format: Format) -> float:
    """Return how far from a grid value rounding errors may put a weight that lies on it, in units of the scale."""
    return float(4 * torch.finfo(dtype).eps * max(-format.low, format.high))


def border(dtype: torch.dtype, format: Format) -> float:
    """Return from where on a weight sits on the edge of the grid, to rounding error, in units of the scale."""
    return float(format.edge * (1 - 8 * torch.finfo(dtype).eps))


def _to_edge(force: Tensor, units: Tensor, quantizer: Quantizer, total: Tensor) -> Tensor:
    """Add the derivative through each block's scale to the weight that sits on the edge of the grid, where float32 scales put the largest.

    Four elementwise passes instead of one argmax, which costs three times as much; weights that tie to rounding error share equally, as in
    autograd.
    """
    mark = hardshrink(units, border(units.dtype, quantizer.format))
    return force.addcmul_(mark, total / (mark * mark).sum(1, keepdim=True).clamp_(min=0.5))  # a block of zeros has nobody on the edge


def _to_extremes(force: Tensor, weight: Tensor, quantizer: Quantizer, total: Tensor, drift: Tensor | None) -> Tensor:
    """Add the derivative through each block's scale, `(blocks, 1)`, to the weights that the absmax rule took it from."""
    format = quantizer.format
    if format.levels != "affine":
        top = weight.abs().argmax(1, keepdim=True)
        sign = -torch.ones_like(total) if format.levels == "full" else weight.gather(1, top).sign()
        return force.scatter_add_(1, top, total * sign / format.edge)
    top, bottom = weight.argmax(1, keepdim=True), weight.argmin(1, keepdim=True)
    share = total / format.high
    if drift is not None:  # the stored minimum moves the whole grid along with the lowest weight
        return force.scatter_add_(1, top, share).scatter_add_(1, bottom, -share - drift)
    above, below = weight.gather(1, top) > 0, weight.gather(1, bottom) < 0
    return force.scatter_add_(1, top, share * above).scatter_add_(1, bottom, -share * below)
