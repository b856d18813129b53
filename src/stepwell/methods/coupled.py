"""LOTION as its paper has it: the penalty's gradient is added to the gradient that the optimizer sees, at frozen scales.

Source: Kwun et al., "LOTION: Smoothing the Optimization Landscape for Quantized Training" (arXiv:2510.08757), Eq. 3, with the empirical
Fisher as curvature and the scale held constant; see `lotion` for the symbols and for the form that we recommend.
Differs: the curvature is an average of the squared *task* gradient of its own. With Adam's second moment, which then holds the penalty as
well, strength times scale times root mean square gradient above 2 grows without bound.
"""

from dataclasses import dataclass

from torch import Tensor

from stepwell.methods.base import Context, Method, round_nearest
from stepwell.methods.fisher import FISHER, check_decay, observe, with_fisher
from stepwell.methods.lotion import Rows, check_terms, penalty_force
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.schedules import Schedule, scheduled


def coupled(
    quantizer: Quantizer,
    *,
    strength: float | Schedule = 1.0,
    loss_terms: float | None = None,
    nearest: bool = False,
    decay: float = 0.99,
) -> Method:
    """Return LOTION with the penalty in the gradient; any optimizer will do.

    Args:
        quantizer: the grid.
        strength: of the penalty in theory's unit, a number or a function of the step.
        loss_terms: loss terms averaged per optimizer step, as in `lotion`.
        nearest: rounded forward pass with the straight-through gradient instead of latent weights.
        decay: of the average of squared gradients.

    Raises:
        TypeError: `quantizer` is no Quantizer, or `strength` neither a number nor a function.
        ValueError: a strength, count of loss terms or decay out of range.
    """
    check_quantizer(quantizer)
    if loss_terms is not None:
        check_terms(loss_terms)
    check_decay(decay)
    return Method(
        quantizer,
        "coupled lotion",
        deploy=round_nearest if nearest else None,
        gradient=Coupled(decay),
        init=with_fisher(None),
        loss_terms=loss_terms,
        counted=True,
        schedules={"strength": scheduled("strength", strength)},
        unbiased=True,
        strength=strength,
    )


@dataclass(frozen=True)
class Coupled:
    """Adds the penalty's gradient to the task's; a record, so that a kernel can do the same. `decay`: of the average of squares."""

    decay: float

    def __call__(self, gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> Tensor:
        """Return the sum."""
        del deployed
        factor = context.loss_terms * context.scheduled["strength"]
        rows = Rows(context.quantizer, context.fitted(weight), factor, through_scale=False)
        force = penalty_force(weight, context.tensors[FISHER], rows)  # of the steps before: the first has no penalty
        observe(context, gradient, self.decay)
        return force.add_(gradient)
