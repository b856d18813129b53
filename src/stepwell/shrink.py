"""Shrink: which of several narrower and narrower grids rounds a block of weights with the least squared error: the search of the mse rule.

Errors are counted in grid units and weighted with the scale, which takes fewer passes over the weights than rounding them. The search
stops where the weights beyond the grid alone cost every block more than its best error so far: grids that are narrower still cost more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stepwell.formats import Format
from stepwell.scales import Fit

PIECE = 2**17  # elements that are searched together: they and their temporaries stay in the cache over all trials
LOOKS = (4, 8, 16, 32)  # trials before which the search looks whether it may stop
SLACK = 1e-4  # float error of a sum of squares, relative

Rounded = Callable[[Tensor, Fit], Tensor]  # (weights in grid units, their fit) -> what becomes of them, in grid units


def least(blocks: Tensor, trials: Fit, unit: Tensor, rounded: Rounded, *, ends: Format | None) -> Fit:
    """Return for each block the trial with the least squared error, the first of equal ones.

    Args:
        blocks: `(blocks, block)` weights.
        trials: `(trials, blocks, 1)` scales, each narrower than the one before, and zero points.
        unit: `(blocks, 1)`, above zero, of the errors: squares of raw weights may under- or overflow.
        rounded: what the grid makes of weights.
        ends: the format whose ends narrower grids pull inwards, from both sides; None where they may move otherwise.
    """
    errors, best = [], torch.full_like(unit, torch.inf)
    for k in range(len(trials.scale)):
        trial = trials.trial(k)
        if k in LOOKS and ends is not None and bool((_beyond(blocks, trial, unit, ends) > best * (1 + SLACK)).all()):
            break
        errors.append(_missed(blocks, trial, unit, rounded))
        best = torch.minimum(best, errors[-1])
    return trials.trial(torch.stack(errors).argmin(0))


def _beyond(blocks: Tensor, fit: Fit, unit: Tensor, ends: Format) -> Tensor:
    """Return what the weights beyond the grid's ends cost."""
    return _missed(blocks, fit, unit, lambda units, _: units.clamp(ends.low, ends.high))


def _missed(blocks: Tensor, fit: Fit, unit: Tensor, moved: Rounded) -> Tensor:
    """Return each block's sum of squared distances to what `moved` makes of its weights, `(blocks, 1)`, in squared units.

    Infinite for a scale that its dtype rounds to zero, where no weight is left.
    """
    total = torch.zeros_like(unit)
    for start in range(0, blocks.shape[1], PIECE):  # a weight may be one block
        units = fit.to_units(blocks[:, start : start + PIECE])
        total += moved(units, fit).sub_(units).square_().sum(1, keepdim=True)
    return total.mul_((fit.scale / unit).square_()).masked_fill_(fit.scale == 0, torch.inf)
