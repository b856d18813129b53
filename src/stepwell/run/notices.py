"""Notices: what a run should be told once although it may go on: a grid that saturates, a penalty beyond its bound.

Sources: Kwun et al., "LOTION" (arXiv:2510.08757), section 3, for the conditions on randomized rounding: unbiased, which no rounding is of a
weight outside the grid. The bound is worked out for a penalty that enters the second moment which is its own curvature: with strength
lambda, scale s and second moment v, that grows without end from lambda s sqrt(v) = 2 on.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.methods.fisher import FISHER
from stepwell.run import moments
from stepwell.run.calibrate import Counted
from stepwell.run.managed import Managed, wide
from stepwell.run.terms import terms_of
from stepwell.schedules import scheduled

BOUND = 2.0
SHARE = 0.1  # of the weights beyond the bound: a few always are, in rows that see large inputs
LOOKS = (1, 10, 100)  # steps after which the bound is checked: second moments need some to settle
SLACK = 1e-5  # of the grid's range: float error is no saturation
SAMPLE = 1 << 20  # weights of a parameter that are looked at


class SaturationWarning(UserWarning):
    """Weights lie outside a grid whose randomized rounding a method takes for unbiased."""


class StrengthWarning(UserWarning):
    """A penalty exceeds its stability bound."""


def watch(run: Counted, managed: Sequence[Managed]) -> None:
    """Look at the grids now and at the penalties' strength after some steps."""
    _say_saturation([one for one in managed if one.method.unbiased and one.begun and one.source.numel()])
    bounded = [one for one in managed if one.method.strength is not None]
    if not bounded:
        return

    def look(last: bool) -> None:
        if last or run.steps > LOOKS[-1] or (run.steps in LOOKS and _say_bound(run, bounded)):
            handle.remove()

    handle = run.on_step(look)


@torch.no_grad()
def _say_saturation(managed: list[Managed]) -> None:
    """Warn where weights lie outside a grid whose randomized rounding a method takes for unbiased, with the bias it has."""
    outside, elements, shifted, size, first = 0, 0, 0.0, 0.0, None
    for one in managed:
        blocks, fit = wide(one.blocks(one.source)), one.held_fit(one.source)
        fit = one.grid.fit(blocks) if fit is None else fit
        shift = one.grid.enclose(blocks, fit).x - blocks
        far = shift.abs() > SLACK * fit.scale.abs() * max(-one.grid.format.low, one.grid.format.high)
        if bool(far.any()):
            first = first or one
            outside += int(far.sum())
            shifted += float((shift * far).abs().sum())
            size += float((blocks * far).abs().sum())
        elements += far.numel()
    if first is not None:
        warnings.warn(
            f"{first.quantizer} saturates: {outside:,} of {elements:,} weights, such as some of {first.name!r}, lie outside it. "
            f"{first.method.name!r} takes randomized rounding for unbiased; it makes these smaller by {shifted / size:.2%} on average. "
            "Use levels='symmetric' or a scale rule that rounds up (`mxfp4()`), or learn the scales (`learned(method)`).",
            SaturationWarning,
            stacklevel=5,  # the caller of `attach`; torch.no_grad is a frame of its own
        )


@torch.no_grad()
def _say_bound(run: Counted, managed: Sequence[Managed]) -> bool:
    """Warn once where a tenth of the weights is beyond the bound; say whether that was so."""
    found = [(one, value) for one in managed if (value := _strength(run, one)) is not None]
    worst = max(found, key=lambda pair: pair[1], default=None)
    if worst is None or worst[1] <= BOUND:
        return False
    one, value = worst
    warnings.warn(
        f"the penalty of {one.method.name!r} on {one.name!r} exceeds its stability bound: strength * loss terms * scale * root mean square "
        f"gradient is {value:.3g} or more for a tenth of the weights, and may be {BOUND:g}. Beyond it the penalty, not the task, decides "
        f"where weights go. Divide `strength` (or `loss_terms`) by {value / BOUND:.2g}, or use `prox(q, ..)`, which is always stable.",
        StrengthWarning,
        stacklevel=2,
    )
    return True


def _strength(run: Counted, one: Managed) -> float | None:
    """Return what a tenth of a parameter's weights exceed, or None before there is any curvature."""
    square = _square(one)
    if square is None or not square.numel() or one.method.strength is None:
        return None
    strength = scheduled("strength", one.method.strength)(run.steps) * terms_of(run.loss_terms, one.method, run.steps)
    blocks, fit = wide(one.blocks(one.source)), one.held_fit(one.source)
    scale = (one.grid.fit(blocks) if fit is None else fit).scale.abs()
    spread = (square.clamp(min=0).sqrt() * scale).flatten()[:SAMPLE]
    return strength * float(spread.kthvalue(max(1, int((1 - SHARE) * spread.numel()))).values)


def _square(one: Managed) -> Tensor | None:
    """Return the mean squared gradient that a method reads, as blocks."""
    if FISHER in one.tensors:
        return one.tensors[FISHER]
    if not moments.reads_moments(one.method) or moments.step_of(one) is None:
        return None
    return wide(one.blocks(moments.second(one))) * moments.bias(one)
