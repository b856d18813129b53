"""Scales that the Run holds: searched once and kept, or searched and then learned, for every method.

Source: Esser et al., "Learned Step Size Quantization" (arXiv:1902.08153), Eq. 3: inside the grid d q(w) / d s = round(w / s) - w / s,
outside it is the outermost value.
Symbols: s = scale, theta = log |s|, g = gradient, q = what the forward pass saw. In log form every block sees
d L / d theta = sum g (q - w) over its weights inside the grid plus sum g q over those outside. Where a scale carries the weights of its
block along, no code changes by it, and d L / d theta = sum g q over all of them, exactly.
Differs: the gradient is formed once per optimizer step from the gradient at the deployed weights, not by autograd in every forward pass;
the scale is learned in log form by an Adam of its own, so that a step is relative, keeps the sign (grids with levels "full" have signed
scales) and needs no gradient scale; the scale starts from a search (from absmax, 2-bit grids end .02 to .05 nats worse).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepwell.methods.base import Context, Gradient, Init, Method
from stepwell.quantizers import Quantizer

SCALE = "scale"  # the Run holds an own tensor of this name as the scale of every block
FIRST, SECOND, STEPS, PEAK = "scale_first", "scale_second", "scale_steps", "scale_peak"

# Scales that are stored coarsely start in the middle of what rounds to the same value, so that their first steps do not change it.
MIDDLE = {("e8m0", "up"): 2**-0.5, ("e8m0", "floor"): 2**0.5, ("e4m3", "up"): 1 - 1 / 24}


def held(method: Method) -> Method:
    """Return a method whose scales are searched when it begins and kept from then on.

    The penalty of a method then acts at fixed scales.

    Raises:
        TypeError: `method` is no Method.
        ValueError: a grid with zero points, or one whose scale is a fixed number.
    """
    _check(method)
    return method._replace(name=f"{method.name}, held scales", init=Scales(method.name, _searched, method.init))


def learned(
    method: Method, *, rate: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, carry: bool = False
) -> Method:
    """Return a method whose scales are searched when it begins and then learned.

    The scales follow the loss of the forward pass; a method's penalty does not reach them (through a learned scale it would shrink the grid
    until many weights lie outside, where the variance of randomized rounding is zero). Methods that train on latent weights have no such
    loss: there the scales follow the squared rounding error, every weight counted with its squared gradient.

    Args:
        method: any method.
        rate: relative step of a scale while the optimizer's learning rate is at its largest so far; it falls with it.
        betas, eps: of the scales' own Adam, which has no weight decay.
        carry: whether a scale carries its block's latent weights along, by the same factor, so that it changes no code: the block then
            grows or shrinks as a whole, and codes are the weights' own business. Weights in half precision stay where they are.

    Raises:
        TypeError: `method` is no Method.
        ValueError: a grid with zero points, or one whose scale is a fixed number; a rate, betas or eps out of range; `carry` for a method
            that trains on latent weights.
    """
    _check(method)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ValueError(f"`rate` must be a relative step of a scale, from 0 to 1: got {rate!r}. 0.003 to 0.01 serves most runs.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"`betas` must be two numbers from 0 to below 1: got {betas!r}.")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"`eps` must be positive and finite: got {eps!r}.")
    if carry and method.deploy is None:
        raise ValueError(f"`carry` needs a rounded forward pass, whose loss says how large a block shall be: {method.name} has none.")
    init = Scales(method.name, _states, method.init)
    gradient = Learned(rate, betas, eps, method.deploy is not None, method.gradient)
    # that some weights lie outside a learned grid is the scales' own choice
    return method._replace(name=f"{method.name}, learned scales", init=init, gradient=gradient, unbiased=False, carries=carry)


@dataclass(frozen=True)
class Learned:
    """Lets the scales of `(blocks, block)` rows learn, and passes the gradient inside the grid; a record, so that a kernel can do the same.

    Attributes:
        rate, betas, eps: as in `learned`.
        sees_grid: whether the forward pass sees the scales, so that the loss has a slope in them.
        inner: the method's own change of the gradient.
    """

    rate: float
    betas: tuple[float, float]
    eps: float
    sees_grid: bool
    inner: Gradient | None

    def __call__(self, gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> Tensor:
        """Move the scales and return the gradient of the weights."""
        inside, slope = (_slope_of_loss if self.sees_grid else _slope_of_error)(gradient, weight, deployed, context)
        passed = gradient * inside if self.sees_grid else gradient
        passed = passed if self.inner is None else self.inner(passed, weight, deployed, context)
        self.step(slope, context)
        return passed

    def step(self, slope: Tensor, context: Context) -> None:
        """Take one Adam step of the log scales down their slope `(blocks, 1)`, in place."""
        own, (one, two) = context.tensors, self.betas
        steps, peak = own[STEPS].add_(1), own[PEAK]
        torch.maximum(peak, context.lr.to(peak.dtype), out=peak)
        first = own[FIRST].lerp_(slope, 1 - one)
        second = own[SECOND].mul_(two).addcmul_(slope, slope, value=1 - two)
        spread = (second / (1 - two**steps)).sqrt_().add_(self.eps)
        share = context.lr / peak.masked_fill(peak == 0, torch.inf)  # the scales' rate falls as the optimizer's does
        own[SCALE].mul_((first / (1 - one**steps)).div_(spread).mul_(share).mul_(-self.rate).exp_())


def _slope_of_loss(gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Return where weights lie inside the grid, and the slope of the loss in each block's log scale `(blocks, 1)`."""
    inside = _inside(weight, context)
    moved = deployed.clone() if context.carries else torch.addcmul(deployed, weight, inside, value=-1)
    return inside, moved.mul_(gradient).sum(1, keepdim=True)


def _slope_of_error(gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Return the same for half the squared rounding error, weighed by the squared gradient, an unbiased guess of its mean square."""
    del deployed
    assert context.fit is not None
    inside, rounded = _inside(weight, context), context.quantizer.snap(weight, context.fit)
    error = (rounded - weight).mul_(gradient).mul_(gradient)
    return inside, rounded.addcmul_(weight, inside, value=-1).mul_(error).sum(1, keepdim=True)


def _inside(weight: Tensor, context: Context) -> Tensor:
    """Return 1 where a weight lies within its grid's range, else 0, in the weight's dtype."""
    fit, format = context.fit, context.quantizer.format
    assert fit is not None
    one, two = fit.scale * format.low, fit.scale * format.high
    inside: Tensor = weight.clamp(torch.minimum(one, two), torch.maximum(one, two)) == weight
    return inside.to(weight.dtype)


@dataclass(frozen=True)
class Scales:
    """Adds scales, and what they learn with, to the tensors that a method makes; a record, so that who has scales is known early.

    Attributes:
        name: of the method.
        made: makes the scales' tensors.
        inner: makes the method's own.
    """

    name: str
    made: Init
    inner: Init | None

    def __call__(self, weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        """Return all of them."""
        own = {} if self.inner is None else self.inner(weight, quantizer)
        if SCALE in own:
            raise ValueError(f"`method`: {self.name} has scales of its own. Wrap it once, in `held` or in `learned`.")
        return {**own, **self.made(weight, quantizer)}


def _states(weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
    """Return searched scales and the state of their Adam."""
    own = _searched(weight, quantizer)
    return {**own, **{name: torch.zeros_like(own[SCALE]) for name in (FIRST, SECOND, STEPS, PEAK)}}


def _searched(weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
    """Return the scales `(blocks, 1)` with the least squared error of rounding, each in the middle of what is stored the same."""
    fp32 = {"scale_dtype": "fp32", "scale_rounding": "nearest"} if quantizer.scale_dtype != "e8m0" else {}
    scale = replace(quantizer, rule="mse", compute=None, **fp32).fit(weight).scale  # type: ignore[arg-type]
    dead = weight.abs().amax(1, keepdim=True) == 0
    if bool(dead.any()):  # a block of zeros has no scale, and one of zero would keep it there: take its neighbours', or a fresh layer's
        usual = (scale.abs() * ~dead).sum() / (~dead).sum().clamp(min=1)
        fresh = 1 / (quantizer.format.edge * weight.shape[1] ** 0.5)
        scale = torch.where(dead, torch.where(usual > 0, usual, fresh), scale)
    return {SCALE: scale * MIDDLE.get((quantizer.scale_dtype, quantizer.scale_rounding), 1.0)}


def _check(method: Method) -> None:
    """Refuse what cannot have scales of its own."""
    if not isinstance(method, Method):
        raise TypeError(f"`method` must be a method such as `ste(int4())`: got {type(method).__name__} {method!r}.")
    quantizer = method.quantizer
    if quantizer.format.levels == "affine":
        raise ValueError(
            f"`method`: {quantizer} has a zero point beside its scale, which cannot be held. Use levels 'symmetric', 'full' or 'mid'."
        )
    if isinstance(quantizer.rule, float):
        raise ValueError(f"`method`: the scale of {quantizer} is fixed at {quantizer.rule:g}. Build it with scale='absmax'.")
