"""Method: a quantizer and up to five pure functions of blocks, which a Run calls around the user's optimizer.

A method never sees a model, a module or a shard. It sees `(blocks, block)` tensors in which each row shares one scale: a whole parameter,
or some rows of it when the Run works through it in pieces. Randomness comes from the context and is a function of the element's place in
the parameter, so pieces and shards draw what the whole would.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell import randomness
from stepwell.quantizers import Quantizer
from stepwell.scales import Fit
from stepwell.schedules import Schedule

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Context(NamedTuple):
    """What a method may know besides the tensors it is given.

    Attributes:
        quantizer: the grid for `(blocks, block)` rows, one scale each.
        step: optimizer steps done since the run began.
        lr: 0-dim, learning rate of the parameter's group; in `prox`, and where a step goes down `push`, times the method's multiplier.
        loss_terms: 0-dim, what turns the curvature that is given into the loss's own: loss terms averaged per optimizer step times the bias
            correction of Adam's second moment; 1 where the caller gives the curvature.
        fit: scales that the Run holds (searched, learned, or spanning the whole tensor); None means refit from the weight.
        tensors: the method's own tensors for these rows, as `init` made them; they may be updated in place.
        key: 0-dim int64, of this parameter's random stream at this step.
        offset: index of the first element of the first row within the whole parameter.
        scheduled: the values of the method's schedules at this step, 0-dim each; numbers would compile a new graph at every step.
        correction: 0-dim, bias correction of Adam's second moment where `prox` is given that as its curvature; None elsewhere.
        carries: whether weights will be multiplied by as much as their scale is moved: the method's own word, but never in half precision,
            where most such steps would be rounded away.
    """

    quantizer: Quantizer
    step: int
    lr: Tensor
    loss_terms: Tensor
    fit: Fit | None
    tensors: Mapping[str, Tensor]
    key: Tensor
    offset: int
    scheduled: Mapping[str, Tensor] = NOTHING
    correction: Tensor | None = None
    carries: bool = False

    def fitted(self, weight: Tensor) -> Fit:
        """Return the Run's scales for these rows, or refit them."""
        return self.quantizer.fit(weight) if self.fit is None else self.fit

    def uniform(self, weight: Tensor) -> Tensor:
        """Return draws in [0, 1), one per element of `weight`."""
        return randomness.uniform(self.key, tuple(weight.shape), offset=self.offset, dtype=weight.dtype, device=weight.device)


Deploy = Callable[[Tensor, Context], Tensor]
Gradient = Callable[[Tensor, Tensor, Tensor, Context], Tensor]
WithCurvature = Callable[[Tensor, Tensor, Context], Tensor]
Init = Callable[[Tensor, Quantizer], dict[str, Tensor]]
Curvature = Mapping[str, Tensor] | Callable[[str], Tensor]


class Method(NamedTuple):
    """A training method; every function takes and returns `(blocks, block)` tensors and None means it is not needed.

    Attributes:
        quantizer: the grid that the method aims at and that `finalize` rounds to.
        name: short, for tables and messages.
        deploy: `(weight, context)` -> what the forward pass sees. With it, the Run keeps the latent weights. It may depend on the step, on
            draws and on own tensors, not on `lr` and `loss_terms`: what it gave must be found again later.
        gradient: `(gradient, weight, deployed, context)` -> the gradient that the optimizer sees.
        push: `(weight, curvature, context)` -> gradient of a penalty, fed to the first moment only.
        prox: `(weight, curvature, context)` -> the weight after the optimizer's step.
        init: `(weight, quantizer)` -> the method's own tensors, each with one row per block. One called "scale", `(blocks, 1)`, is the
            scale of every block from then on: the Run holds it as `context.fit` and encodes with it.
        curvature: `(blocks, block)` positive numbers come from here: None is the optimizer's bias-corrected second moment; else a mapping
            or function from parameter name to a tensor of the parameter's shape.
        loss_terms: loss terms averaged per optimizer step, where the method counts them; None where the Run is told.
        curved: whether `push` and `prox` read their curvature; where they do not, any optimizer will do and they are given the weight.
        schedules: numbers that change with the step, each a function of the steps done; the functions above read `context.scheduled`.
        counted: whether `context.loss_terms` is needed although the curvature is not the optimizer's.
        unbiased: whether the method takes randomized rounding for unbiased, which it is only inside the grid.
        strength: of a penalty whose gradient moves the weights, in theory's unit; what its stability is judged by.
        carries: whether the latent weights of a block are multiplied by as much as `gradient` has moved its own "scale".
        rate_multiplier: how many times as long the optimizer's steps of the latent weights are made, weight decay included.
    """

    quantizer: Quantizer
    name: str
    deploy: Deploy | None = None
    gradient: Gradient | None = None
    push: WithCurvature | None = None
    prox: WithCurvature | None = None
    init: Init | None = None
    curvature: Curvature | None = None
    loss_terms: float | None = None
    curved: bool = True
    schedules: Mapping[str, Schedule] = MappingProxyType({})
    counted: bool = False
    unbiased: bool = False
    strength: float | Schedule | None = None
    carries: bool = False
    rate_multiplier: float = 1.0

    @property
    def deploys_nearest(self) -> bool:
        """Whether the forward pass sees the nearest grid weights."""
        return self.deploy is round_nearest

    @property
    def axis(self) -> int | None:
        """The quantizer's contraction dimension."""
        return self.quantizer.axis


def round_nearest(weight: Tensor, context: Context) -> Tensor:
    """Return the weight on its grid: the forward pass of straight-through training."""
    return context.quantizer.snap(weight, context.fitted(weight))


def fitted_apart(weight: Tensor, context: Context) -> Fit:
    """Return the scales of these rows, where compiled from a graph of their own: torch 2.13 fails on long ones (KeyError 'buf2')."""
    fit = context.fitted(weight)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()
    return fit


def fitted_in_place(weight: Tensor, context: Context) -> Fit:
    """Return the same, from one graph where that is short enough to compile: without zero points."""
    return fitted_apart(weight, context) if context.quantizer.format.levels == "affine" else context.fitted(weight)
