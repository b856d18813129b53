"""Fisher: curvature from an average of squared gradients that the Run keeps, for optimizers without a second moment.

Source: the empirical Fisher diagonal of Kwun et al., "LOTION" (arXiv:2510.08757), as an average of its own instead of Adam's second moment.
Symbols: F = mean of the squared gradient of one optimizer step; times the loss terms that a step averages over it is the curvature.
Differs: the average is a plain mean over the first steps and exponential after them, so that it needs no bias correction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.methods.base import Context, Gradient, Init, Method, WithCurvature
from stepwell.quantizers import Quantizer

FISHER, SEEN = "fisher", "fisher_seen"


def fisher(method: Method, *, decay: float = 0.99) -> Method:
    """Return a method that takes its curvature from its own average of squared gradients: for SGD, Muon and their like.

    Costs one more tensor of the weight's size, and another while a step is open, which takes the average back should the step fail. It
    averages the task gradient, before a method changes it.

    Args:
        method: one with a penalty or a proximal step that reads curvature, such as `lotion(q, loss_terms=..)` or `prox(q, ..)`.
        decay: of the average, per step, from 0 to below 1.

    Raises:
        TypeError: `method` is no Method.
        ValueError: a method that reads no curvature or has some already; a decay out of range.
    """
    if not isinstance(method, Method):
        raise TypeError(f"`method` must be a method such as `lotion(int4())`: got {type(method).__name__} {method!r}.")
    if method.curvature is not None or not method.curved or (method.push is None and method.prox is None):
        raise ValueError(f"`method`: {method.name} reads no curvature that could come from here. `lotion(q)` and `prox(q, ..)` do.")
    check_decay(decay)
    return method._replace(
        name=f"{method.name}, own curvature",
        init=with_fisher(method.init),
        gradient=Observed(decay, method.gradient),
        push=None if method.push is None else Reading(method.push),
        prox=None if method.prox is None else Reading(method.prox),
        curved=False,
        counted=True,
    )


def check_decay(decay: float) -> None:
    """Raise unless a decay of an average is from 0 to below 1."""
    if not (math.isfinite(decay) and 0 <= decay < 1):
        raise ValueError(f"`decay` must be a number from 0 to below 1: got {decay!r}.")


def with_fisher(init: Init | None) -> Init:
    """Return an `init` that adds the average, `(blocks, block)`, and how many steps it has seen, `(blocks, 1)`."""

    def both(weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        own = {} if init is None else init(weight, quantizer)
        return {**own, FISHER: torch.zeros_like(weight), SEEN: torch.zeros_like(weight[:, :1])}

    return both


def observe(context: Context, gradient: Tensor, decay: float) -> None:
    """Take a step's gradient into the average, in place."""
    seen = context.tensors[SEEN].add_(1)
    share, mean = seen.reciprocal().clamp_(min=1 - decay), context.tensors[FISHER]
    mean.add_(gradient.square().sub_(mean).mul_(share))


@dataclass(frozen=True)
class Observed:
    """Takes every gradient into the average before a method changes it; a record, as a kernel can do the same.

    Attributes:
        decay: of the average.
        inner: the method's own change of the gradient.
    """

    decay: float
    inner: Gradient | None

    def __call__(self, gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> Tensor:
        """Return the method's gradient."""
        observe(context, gradient, self.decay)
        return gradient if self.inner is None else self.inner(gradient, weight, deployed, context)


@dataclass(frozen=True)
class Reading:
    """Gives a function the average as its curvature."""

    function: WithCurvature

    def __call__(self, weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
        """Return what the function returns."""
        del curvature
        return self.function(weight, context.tensors[FISHER], context)
