"""One pass: parameters whose whole step `sw.optim.AdamW` makes itself, so that the Run makes no passes around it.

What the optimizer can do is decided here anew at every step, by parameter; everything else goes through the hooks as with any optimizer.
"""

from collections.abc import Sequence

from torch.optim import Optimizer

from stepwell.blocks import block_length
from stepwell.methods.lotion import Push
from stepwell.optim import AdamW
from stepwell.optim.task import Task
from stepwell.run import moments
from stepwell.run.managed import Managed
from stepwell.run.passes import REACH


def assign(optimizer: Optimizer, counted: Sequence[tuple[Managed, float]]) -> set[Managed]:
    """Hand the optimizer the tasks of its next step, and return the records that it takes with them.

    Args:
        optimizer: about to step.
        counted: its parameters with their loss terms; none takes back what was handed over.
    """
    if not isinstance(optimizer, AdamW):
        return set()
    found = {one: task for one, terms in counted if (task := task_of(one, terms)) is not None}
    optimizer.assign({one.parameter: task for one, task in found.items()})
    return set(found)


def takes_all(managed: Sequence[Managed]) -> bool:
    """Whether an optimizer makes the whole step of every parameter, as things are now."""
    return all(isinstance(one.optimizer, AdamW) and _served(one, one.optimizer) for one in managed)


def task_of(one: Managed, terms: float) -> Task | None:
    """Return what a parameter's method asks of its optimizer's step, or None where the hooks must do it."""
    optimizer = one.optimizer
    if not isinstance(optimizer, AdamW) or not _served(one, optimizer):
        return None
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return None  # a GradScaler speaks to torch's own step
    fit, push = one.held_fit(one.parameter if one.latent is None else one.latent), one.method.push
    quantizer, block = one.quantizer, _block(one)
    scales = None if fit is None else fit.scale.to(one.parameter).contiguous()
    if not isinstance(push, Push):
        return Task(quantizer.format, block, one.latent, scales)
    return Task(quantizer.format, block, one.latent, scales, terms, push.strength, push.through_scale, REACH)


def _served(one: Managed, optimizer: AdamW) -> bool:
    """Whether an optimizer makes the whole step of a parameter."""
    return _known(one) and optimizer.serves(one.parameter, one.group, _block(one))


def _block(one: Managed) -> int:
    """Return how many elements share one scale."""
    return block_length(tuple(one.parameter.shape), one.quantizer.block, one.quantizer.axis)


def _known(one: Managed) -> bool:
    """Whether the kernels know a parameter's method and grid, and its blocks lie one after the other in contiguous memory."""
    method, quantizer = one.method, one.quantizer
    if (
        method.rate_multiplier != 1
        or method.gradient is not None
        or method.prox is not None
        or not (method.deploy is None or method.deploys_nearest)
    ):
        return False
    if method.push is None:
        known = method.deploy is not None
    else:
        known = isinstance(method.push, Push) and method.curvature is None and moments.exact(one.optimizer, one.group)
    return (
        known
        and quantizer.format.levels in ("symmetric", "full")
        and (quantizer.scale_dtype, quantizer.compute) == ("fp32", None)
        and isinstance(quantizer.rule, str)  # else the scale is a fixed number
        and (quantizer.block is None or quantizer.axis in (None, -1, one.parameter.ndim - 1))
    )
