"""Distillation: the loss of any loop, half of it how far the model's predictions are from those of a full-precision teacher.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2. With z the model's logits and
t the teacher's: (1 - weight) * cross entropy + weight * T^2 * KL(softmax(t / T) || softmax(z / T)), both means over the loss terms.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

Loss = Callable[..., Tensor]


def distillation(teacher: nn.Module, *, weight: float = 0.5, temperature: float = 2.0) -> Loss:
    """Return a loss function `loss(logits, targets, *inputs)` with a teacher in it.

    The teacher should be a finished full-precision run on the same data: a run that its learning rate had not cooled down yet makes a
    harmful one. Compare such a run only with a full-precision run that had the same teacher.

    Args:
        teacher: called as `teacher(*inputs)` without gradients; it is put into evaluation mode.
        weight: share of the teacher's term, 0 to 1.
        temperature: T, positive.

    Returns:
        A function of logits `(*shape, classes)`, target classes `(*shape)` (-100 does not count) and the model's inputs, 0-dim in nats.

    Raises:
        TypeError: `teacher` is no module.
        ValueError: a weight or temperature out of range.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"`teacher` must be a torch module: got {type(teacher).__name__}.")
    if not (math.isfinite(weight) and 0 <= weight <= 1):
        raise ValueError(f"`weight` must be a share from 0 to 1: got {weight!r}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be positive and finite: got {temperature!r}. 2 is usual.")
    teacher.eval()

    def loss(logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        if not inputs:
            raise TypeError("the teacher needs the model's `inputs`: call the loss as `loss(logits, targets, *inputs)`.")
        with torch.no_grad():
            taught = teacher(*inputs)
        return (1 - weight) * plain(logits, targets) + weight * divergence(logits, taught, targets, temperature)

    return loss


def plain(logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
    """Return the mean cross entropy of logits `(*shape, classes)` and target classes `(*shape)`, 0-dim; a loss without a teacher."""
    del inputs
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def divergence(logits: Tensor, taught: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return `T^2 KL(teacher || model)` at temperature T, the mean over the targets that count, 0-dim."""
    counted = targets.flatten() != -100
    ours, theirs = (log_softmax(part.flatten(0, -2)[counted] / temperature, -1) for part in (logits, taught))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
