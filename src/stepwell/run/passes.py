"""Passes: what a Run does to one parameter around an optimizer step, over `(blocks, block)` rows.

Two paths give the same numbers. Eager works through the rows in pieces that stay in the processor's cache, because a chain of whole-tensor
temporaries would move each of them through memory: at ten million parameters that costs 90 optimizer steps. Compiled hands the same
functions to `torch.compile`, whole.
"""

import shutil
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from stepwell.methods.base import Context, Method
from stepwell.run.managed import SCALE, Managed, wide
from stepwell.run.told import MOVED, Told, scalar

PIECE = 1 << 17  # elements per piece: small enough for the cache, large enough to hide the dispatch of some forty operations
LARGE = 1 << 24  # elsewhere: a GPU has no such cache, and starting a small operation costs it more than its memory traffic
PAYS = 1 << 24  # managed elements from which a compilation of some ten seconds is worth waiting for

REACH = 10.0  # how many root mean square gradients a penalty may push a weight with

Pass = Callable[..., None]


def deploy(method: Method, context: Context, parameter: Tensor, latent: Tensor) -> None:
    """Take over the optimizer's result as the latent weight and write what the forward pass shall see."""
    assert method.deploy is not None
    latent.copy_(parameter)
    shown = method.deploy(wide(latent), context)  # on a line of its own: a graph may end inside
    parameter.copy_(shown)


def show(method: Method, context: Context, parameter: Tensor, latent: Tensor) -> None:
    """Write what the forward pass shall see, from the latent weight."""
    assert method.deploy is not None
    shown = method.deploy(wide(latent), context)
    parameter.copy_(shown)


def lengthen(method: Method, context: Context, parameter: Tensor, latent: Tensor) -> None:
    """Make the optimizer's step as many times as long as the method says; the latent weight is still the one before."""
    before = wide(latent)
    if MOVED in context.tensors:
        before = before * context.tensors[MOVED]
    parameter.copy_(torch.lerp(before, wide(parameter), method.rate_multiplier))


def arrive(method: Method, context: Context, parameter: Tensor, latent: Tensor) -> None:
    """Do both: make the optimizer's step longer, and deploy where it leads."""
    lengthen(method, context, parameter, latent)
    deploy(method, context, parameter, latent)


def gradient(method: Method, context: Context, gradient: Tensor, weight: Tensor, parameter: Tensor) -> None:
    """Replace the gradient by the method's, and hand the optimizer the latent weight where the forward pass saw another.

    Scales that carry weights along do so here, and say by how much; the latent weight itself stays.
    """
    assert method.gradient is not None
    before = context.tensors[SCALE].clone() if context.carries else None
    gradient.copy_(method.gradient(wide(gradient), wide(weight), wide(parameter), context))
    if before is not None:
        parameter.copy_(weight * context.tensors[MOVED].copy_(context.tensors[SCALE] / before))
    elif method.deploy is not None:
        parameter.copy_(weight)


def push(
    method: Method,
    context: Context,
    weight: Tensor,
    moment: Tensor,
    curvature: Tensor,
    second: Tensor,
    factor: Tensor,
    spread: Tensor,
    floor: Tensor,
) -> None:
    """Add the penalty's gradient to the first moment so that this step sees it as part of the gradient and the second moment does not.

    It is bounded by REACH times the weight's own root mean square gradient, as Adam divides by that: a weight without curvature of its own
    (a dead unit, an input that is always zero) may be its block's largest and receive the whole block's derivative through the scale: one
    step would throw it away by 1e5 (measured: NaN in 6 of 36 settings on digits, none with the bound, which binds on 0.1 % of weights).

    `factor`: 0-dim, (1 - beta1) / beta1; `spread`: REACH**2 times the bias correction of `second`; `floor`: REACH times Adam's epsilon.
    """
    assert method.push is not None
    bound = (wide(second) * spread).sqrt_().add_(floor)
    moment.addcmul_(method.push(wide(weight), wide(curvature), context).clamp_(-bound, bound), factor)


def descend(method: Method, context: Context, into: Tensor, weight: Tensor, curvature: Tensor) -> None:
    """Write a step down the penalty: for optimizers whose moments we do not know.

    The caller takes the step; in place, torch 2.13 fails to compile the reductions over a tensor that is overwritten (KeyError 'buf2').
    """
    assert method.push is not None
    into.copy_(method.push(wide(weight), wide(curvature), context).mul_(context.lr))


def prox(method: Method, context: Context, weight: Tensor, curvature: Tensor) -> None:
    """Apply the method's proximal map after the optimizer."""
    assert method.prox is not None
    weight.copy_(method.prox(wide(weight), wide(curvature), context))


def piecewise(work: Pass, managed: Managed, told: Told, tensors: list[Tensor], *numbers: float | Tensor) -> None:
    """Run a pass over groups of rows, cache-sized on a CPU."""
    context, scalars = told.context(tensors[0]), [scalar(number, tensors[0]) for number in numbers]
    blocks = [managed.blocks(tensor) for tensor in tensors]
    rows, length = blocks[0].shape
    group = max(1, (PIECE if tensors[0].is_cpu else LARGE) // length)
    for start in range(0, rows, group):
        stop = min(start + group, rows)
        part = context if stop - start == rows else _rows(context, start, stop, length)
        work(managed.method, part, *(block[start:stop] for block in blocks), *scalars)
    for tensor, block in zip(tensors, blocks, strict=True):
        managed.put_back(tensor, block)


def whole(compiled: dict[Any, Pass]) -> Callable[..., None]:
    """Return the runner that compiles each pass once per method; `compiled` keeps them."""

    def run(work: Pass, managed: Managed, told: Told, tensors: list[Tensor], *numbers: float | Tensor) -> None:
        if work is arrive:  # a graph each: torch 2.13 fails on reductions over a tensor that was overwritten (KeyError 'buf3')
            run(lengthen, managed, told, tensors)
            run(deploy, managed, told, tensors)
            return
        context, scalars = told.context(tensors[0]), [scalar(number, tensors[0]) for number in numbers]
        key = (work, id(managed.method))  # a method may hold a mapping, which cannot be hashed; the Run keeps the method alive
        blocks = [managed.blocks(tensor) for tensor in tensors]
        if key in compiled:
            compiled[key](managed.method, context, *blocks, *scalars)
        else:
            compiled[key] = torch.compile(_own_copy(work), dynamic=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lru_cache")  # a grid's tables are constants: tracing their maker is right
                compiled[key](managed.method, context, *blocks, *scalars)
        for tensor, block in zip(tensors, blocks, strict=True):
            managed.put_back(tensor, block)

    return run


def _own_copy(work: Pass) -> Pass:
    """Return a pass with a code object of its own: torch counts recompilations, and gives up, per code object."""
    assert isinstance(work, FunctionType)
    return FunctionType(work.__code__.replace(), work.__globals__, work.__name__)


def compile_pays(elements: int, device: torch.device) -> bool:
    """Say whether the automatic path compiles: only where a compiler is found and the model is large enough."""
    if elements < PAYS:
        return False
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return True


def _rows(context: Context, start: int, stop: int, length: int) -> Context:
    """Return the context of some of the rows."""
    return context._replace(
        fit=None if context.fit is None else context.fit.rows(start, stop),
        tensors={key: tensor[start:stop] for key, tensor in context.tensors.items()},
        offset=context.offset + start * length,
    )
