"""CAGE: straight-through training, and after every step a decoupled pull of the latent weights to their rounding.

Source: Tabesh et al., "CAGE: Curvature-Aware Gradient Estimation For Accurate Quantization-Aware Training" (arXiv:2510.18784), the
decoupled form: w <- AdamW(w, gradient at Q(w)) - lr lambda (w - Q(w)). Symbols: pull = lambda.
Differs: the pull is taken at the weight that the optimizer's step led to (theirs at the one before), and goes at most all the way.
"""

from torch import Tensor

from stepwell.methods.base import Context, Method, round_nearest
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.schedules import Schedule, scheduled


def cage(quantizer: Quantizer, *, pull: float | Schedule) -> Method:
    """Return straight-through training with a decoupled pull to the grid; any optimizer will do.

    Args:
        quantizer: the grid.
        pull: lambda, a number or a function of the step. The authors leave it at 0 for most of the run and let it grow linearly at the end,
            as `schedules.linear(0, 10, begin=225, steps=25)` does.

    Raises:
        TypeError: `quantizer` is no Quantizer, or `pull` neither a number nor a function.
        ValueError: a pull that is negative or not finite.
    """
    check_quantizer(quantizer)
    return Method(quantizer, "cage", deploy=round_nearest, prox=pulled, curved=False, schedules={"pull": scheduled("pull", pull)})


def pulled(weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
    """Return the weight after its way towards the grid."""
    del curvature
    share = (context.lr * context.scheduled["pull"]).clamp(max=1)
    return (round_nearest(weight, context) - weight).mul_(share).add_(weight)
