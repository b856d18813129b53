"""PARQ: the forward pass moves from free to quantized weights along a piecewise-affine map whose pieces steepen until they are steps.

Source: Jin et al., "PARQ: Piecewise-Affine Regularized Quantization" (arXiv:2503.15748), the proximal map of section 3 and the sigmoid of
section 5. Symbols: slope = rho, the inverse slope of the map's steep pieces (1 leaves a weight inside the grid alone, 0 rounds it).
Between two neighbours `lower`, `upper` with middle `m` the map is `clip(m + (w - m) / rho, lower, upper)`.
Differs: it works on blocks with the scales of any rule, where the authors refit theirs from mean magnitudes; the model sees what the map
gives and the gradient found there moves the latent weight, as in their optimizer.
"""

import torch
from torch import Tensor

from stepwell import grids, rounding
from stepwell.methods.base import Context, Method, fitted_in_place
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.scales import Fit
from stepwell.schedules import Schedule, scheduled


def parq(quantizer: Quantizer, *, slope: float | Schedule) -> Method:
    """Return training with PARQ's annealed forward pass.

    Args:
        quantizer: the grid.
        slope: 1 where weights are free, 0 where they are rounded, a number or a function of the step; PARQ anneals it with
            `schedules.sigmoid(1, 0, steps=...)`. Values above 1 count as 1.

    Raises:
        TypeError: `quantizer` is no Quantizer, or `slope` neither a number nor a function.
        ValueError: a slope that is negative or not finite.
    """
    check_quantizer(quantizer)
    return Method(quantizer, "parq", deploy=annealed, schedules={"slope": scheduled("slope", slope)})


def annealed(weight: Tensor, context: Context) -> Tensor:
    """Return what the forward pass sees at the step's slope."""
    return affine(weight, context.quantizer, fitted_in_place(weight, context), context.scheduled["slope"])


def affine(weight: Tensor, quantizer: Quantizer, fit: Fit, slope: Tensor) -> Tensor:
    """Return `(blocks, block)` weights drawn towards their nearest grid values, in weight units; nothing is checked.

    A weight in the middle of its cell stays; the nearer it is to a grid value, the sooner it gets there. LOTION's proximal step is this
    map with a slope of its own for every weight.

    Args:
        weight: `(blocks, block)`; what lies outside the grid comes to its edge.
        quantizer: the grid of these rows.
        fit: their scales.
        slope: 0-dim or `(blocks, block)`, at most 1; 0 and less round to nearest.
    """
    format = quantizer.format
    units = fit.to_units(weight).clamp_(format.low, format.high)
    if format.uniform:
        target = grids.round_nearest(units, format)
        still = (1 - slope) / 2  # how far from its nearest grid value a weight must be to leave it
    else:
        found = grids.bracket(units, format)
        target, still = rounding.nearest(found), (found.upper - found.lower) * ((1 - slope) / 2)
    still = still.clamp_(min=0)
    rest = units.sub_(target)
    rest.sub_(torch.clamp(rest, -still, still))
    return quantizer.deliver(target.addcdiv_(rest, slope.clamp(min=torch.finfo(torch.float32).tiny)), fit)
