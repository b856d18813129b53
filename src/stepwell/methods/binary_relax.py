"""BinaryRelax: the forward pass sees a weighted mean of the latent weight and its rounding, with growing weight on the latter.

Source: Yin et al., "BinaryRelax: A Relaxation Approach for Training Deep Neural Networks with Quantized Weights" (arXiv:1801.06313), Eq. 6:
u = (w + lambda Q(w)) / (1 + lambda). Symbols: share = lambda / (1 + lambda), 0 where weights are free, 1 where they are rounded.
Differs: any grid and any way from 0 to 1 (the authors grow lambda by a factor per epoch and then switch to rounding); the scales follow the
quantizer's rule.
"""

from torch import Tensor

from stepwell.methods.base import Context, Method, round_nearest
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.schedules import Schedule, scheduled


def binary_relax(quantizer: Quantizer, *, share: float | Schedule) -> Method:
    """Return training with BinaryRelax's forward pass.

    Args:
        quantizer: the grid.
        share: of the rounded weight in what the model sees, a number or a function of the step such as `schedules.linear(0, 1, steps=...)`;
            values above 1 count as 1.

    Raises:
        TypeError: `quantizer` is no Quantizer, or `share` neither a number nor a function.
        ValueError: a share that is negative or not finite.
    """
    check_quantizer(quantizer)
    return Method(quantizer, "binary relax", deploy=relaxed, schedules={"share": scheduled("share", share)})


def relaxed(weight: Tensor, context: Context) -> Tensor:
    """Return what the forward pass sees at the step's share."""
    rounded = round_nearest(weight, context)
    free = (1 - context.scheduled["share"]).clamp(min=0)  # exact where nothing is free; torch.lerp differs in the last bit by processor
    return (weight - rounded).mul_(free).add_(rounded)
