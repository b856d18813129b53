"""Moments: where a penalty's curvature comes from, and whether an optimizer's first moment can take the penalty.

Adam, AdamW and RAdam mix the gradient into `exp_avg` and use it only from there, so what is added to `exp_avg` beforehand acts as a part of
the gradient that the second moment does not see. Nothing here reads a number back from the device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer, RAdam

from stepwell.methods.base import Method
from stepwell.run.managed import Managed, local

EXACT = (Adam, RAdam)  # AdamW is an Adam


def exact(optimizer: Optimizer | None, group: Mapping[str, Any]) -> bool:
    """Whether a parameter group's first moment takes a push exactly."""
    return isinstance(optimizer, EXACT) and float(group["betas"][0]) > 0


def reads_moments(method: Method) -> bool:
    """Whether a method takes its curvature from the optimizer."""
    return method.curvature is None and method.curved and (method.push is not None or method.prox is not None)


def step_of(one: Managed) -> Tensor | float | None:
    """Return the optimizer's own step count of a parameter whose first moment exists, else None: a number, or a copy on its device."""
    state: Any = {} if one.optimizer is None else one.optimizer.state.get(one.parameter, {})
    if "exp_avg" not in state:
        return None
    step = state["step"]
    return step.clone() if isinstance(step, Tensor) and not step.is_cpu else float(step)


def first(one: Managed) -> Tensor:
    """Return the local part of the first moment."""
    assert one.optimizer is not None
    return local(one.optimizer.state[one.parameter]["exp_avg"])


def second(one: Managed) -> Tensor:
    """Return the local part of the second moment, uncorrected."""
    assert one.optimizer is not None
    return local(one.optimizer.state[one.parameter]["exp_avg_sq"])


def curvature(one: Managed) -> Tensor:
    """Return the curvature, of the parameter's local shape; Adam's second moment is left uncorrected, to save a pass."""
    given = one.method.curvature
    if given is not None:
        return local(given(one.name) if callable(given) else given[one.name]).to(one.weight)
    return second(one) if one.method.curved else one.weight


def correction(one: Managed) -> Tensor | float:
    """Return what turns the curvature into the loss's own: Adam's bias correction, and 1 for curvature that is not Adam's."""
    return bias(one) if reads_moments(one.method) else 1.0


def bias(one: Managed) -> Tensor | float:
    """Return the bias correction of Adam's second moment, a number or 0-dim; 0 before the first step."""
    step, beta = step_of(one), float(one.group["betas"][1])
    if isinstance(step, Tensor):
        return torch.where(step > 0, 1 / (1 - beta ** step.double()), 0.0)
    return 1 / (1 - beta**step) if step else 0.0
