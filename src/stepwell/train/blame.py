"""Blame: where in a model the first number that is not finite comes from."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.train.language import row_losses
from stepwell.train.recipe import Recipe


class DivergedError(ArithmeticError):
    """A loss or a gradient that is no finite number."""


def culprit(model: nn.Module, batches: Iterable[Tensor], recipe: Recipe) -> str:
    """Return in words where a step that went wrong first holds a number that is not finite.

    Args:
        model: with the gradients of the step, not yet clipped.
        batches: the step's micro-batches, run again.
        recipe: of the run.
    """
    weight = _first(model.named_parameters())
    if weight:
        return f"the weight {weight}"
    for tokens in batches:
        output = _first_output(model, tokens, recipe)
        if output:
            return f"the output of {output}"
    # the backward pass begins at the end of the model
    gradient = _first((name, p.grad) for name, p in reversed(list(model.named_parameters())) if p.grad is not None)
    return f"the gradient of {gradient}" if gradient else "the loss alone"


def _first_output(model: nn.Module, tokens: Tensor, recipe: Recipe) -> str:
    """Return the name of the first module whose output is not finite; empty where all are."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if not found and not all(_finite(one) for one in outputs if isinstance(one, Tensor)):
            found.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(lambda _, __, output, name=name: look(name, output)) for name, module in leaves]
    try:
        with torch.no_grad():
            losses = row_losses(model, tokens, recipe.precision)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "" if _finite(losses) else "the model's head, in the loss"


def _first(tensors: Iterable[tuple[str, Tensor]]) -> str:
    return next((name for name, tensor in tensors if not _finite(tensor)), "")


def _finite(tensor: Tensor) -> bool:
    """Return whether every element is finite; of a tensor in shards, whether this process's are."""
    mine: Any = tensor.detach()
    part: Tensor = mine.to_local() if hasattr(mine, "to_local") else mine
    return not part.is_floating_point() or math.isfinite(float(part.abs().sum(dtype=torch.float64)))
