"""Sampled rounding: the forward pass sees one draw of randomized rounding per step, the gradient found there moves the latent weight.

Source: the smoothed loss E L(RR(w)) of Kwun et al., "LOTION" (arXiv:2510.08757), section 3, estimated by one draw where LOTION expands it;
known as rounding-aware training (RAT) with the straight-through estimator. In expectation over the draws this is the gradient at the weight
itself wherever the loss is quadratic: what the smoothing adds is noise, not a force. Differs from STE in the rounding alone.
"""

from torch import Tensor

from stepwell.methods.base import Context, Method, fitted_apart
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.rounding import pick


def sampled(quantizer: Quantizer) -> Method:
    """Return training under randomized rounding; a draw depends on the run's seed, the step, the parameter and the element's place.

    Args:
        quantizer: the grid. It should not saturate: a weight outside it is rounded to its edge at every draw, which is a bias.

    Raises:
        TypeError: `quantizer` is no Quantizer.
    """
    check_quantizer(quantizer)
    return Method(quantizer, "sampled", deploy=drawn, unbiased=True)


def drawn(weight: Tensor, context: Context) -> Tensor:
    """Return one draw of randomized rounding."""
    return pick(context.quantizer.enclose(weight, fitted_apart(weight, context)), context.uniform(weight))
