"""Loss terms: over how many terms of the loss a step averages, which turns Adam's squared mean gradient into curvature."""

from collections.abc import Callable

from stepwell.methods.base import Method
from stepwell.methods.lotion import check_terms
from stepwell.run.moments import reads_moments

LossTerms = float | Callable[[int], float] | None


class Measured(float):
    """A count that `run.calibrate` measured; unlike one that somebody told the Run, it goes with the optimizer's state."""


def counts(method: Method) -> bool:
    """Whether a method needs the number of loss terms."""
    return reads_moments(method) or method.counted


def terms_of(given: LossTerms, method: Method, step: int) -> float:
    """Return the loss terms of a step for one parameter; `given` is what the Run was told, which goes before what the method was."""
    if not counts(method):
        return 1.0
    told = method.loss_terms if given is None else given
    if told is None:
        raise RuntimeError(
            "`loss_terms` is not set: Adam's second moment is the squared mean gradient, and the penalty needs to know over how many "
            "loss terms a step averages. Use `lotion(q, loss_terms=batch * sequence)`, or set `run.loss_terms` before the step, or let "
            "`run.calibrate(loss, batches)` measure it."
        )
    terms = told(step) if callable(told) else told
    check_terms(terms)
    return float(terms)
