"""Blame: where in a model the first number that is not finite comes from."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.train.language import row_losses
from stepwell.train.ranks import Ranks
from stepwell.train.recipe import Recipe


class DivergedError(ArithmeticError):
    """A loss or a gradient that is no finite number."""


def culprit(model: nn.Module, batches: Iterable[Tensor], recipe: Recipe, ranks: Ranks) -> str:
    """Return in words where a step that went wrong first holds a number that is not finite. Every process calls it, and gets the same.

    Args:
        model: with the gradients of the step, not yet clipped.
        batches: this process's micro-batches of the step, run again.
        recipe: of the run.
        ranks: each sees its own shards and rows; they agree before one of them goes on alone.
    """
    weight = _agreed([(name, not _finite(weight)) for name, weight in model.named_parameters()], ranks)
    if weight:
        return f"the weight {weight}"
    # the backward pass begins at the end of the model; gathered before the model runs again, which leaves FSDP2's root without gradients
    trained = [(name, parameter.grad) for name, parameter in reversed(list(model.named_parameters())) if parameter.requires_grad]
    for tokens in batches:
        output = _agreed(_first_output(model, tokens, recipe), ranks)
        if output:
            return f"the output of {output}"
    gradient = _agreed([(name, grad is not None and not _finite(grad)) for name, grad in trained], ranks)
    return f"the gradient of {gradient}" if gradient else "the loss alone"


def _first_output(model: nn.Module, tokens: Tensor, recipe: Recipe) -> list[tuple[str, bool]]:
    """Return every module without parts, and whether it was the first whose output is not finite."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if not found and not all(_finite(one) for one in outputs if isinstance(one, Tensor)):
            found.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(lambda _, __, output, name=name: look(name, output)) for name, module in leaves]
    try:
        with torch.no_grad():
            row_losses(model, tokens, recipe.precision)
    finally:
        for handle in handles:
            handle.remove()
    return [(name, name in found) for name, _ in leaves]


def _agreed(flags: list[tuple[str, bool]], ranks: Ranks) -> str:
    """Return the first name that any process has raised its flag for; empty where none has."""
    raised = ranks.total(torch.tensor([float(flag) for _, flag in flags], device=ranks.device)) > 0
    return flags[int(raised.double().argmax())][0] if bool(raised.any()) else ""


def _finite(tensor: Tensor) -> bool:
    """Return whether every element is finite; of a tensor in shards, whether this process's are."""
    mine: Any = tensor.detach()
    part: Tensor = mine.to_local() if hasattr(mine, "to_local") else mine
    return not part.is_floating_point() or math.isfinite(float(part.abs().sum(dtype=torch.float64)))
