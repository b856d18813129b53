"""Descent: gradient steps on latent weights while the model shows what is made of them; the loop of `box_qat` and `control`.

Adam with a cosine schedule, everything but the named weights held fixed, evaluation mode. Memory is that of training, five copies of the
weights besides the model's own: the one that restores it, latent weights, their gradient (kept whole, because a step whose gradient is not
finite is left out) and Adam's two moments.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from stepwell.probes.points import Move, working
from stepwell.probes.stage import Loss, Stage

Train = Callable[[nn.Module, int], Tensor]  # (model, step) -> loss on that step's batch
STEPS, LR = 240, 1e-3


def descend(
    stage: Stage,
    train: Train | None,
    *,
    steps: int,
    lr: float,
    show: Move,
    keep: Move,
    visit: Callable[[int], None],
    visits: Collection[int] | None = None,
) -> dict[str, Tensor]:
    """Return the latent weights after training; the model shows `show` of them.

    Args:
        stage: the model.
        train: loss of a step; None is the stage's own loss at every step.
        steps: of the whole schedule.
        lr: Adam's, annealed to zero by a cosine.
        show: `(name, latent)` -> what the forward pass sees.
        keep: `(name, latent)` -> the latent weights after a step.
        visit: called with the number of steps done, when it is one of `visits`.
        visits: the last of them ends the training, whatever the schedule; None is 0, 1, 2, 4, 8, .. and the schedule's end.
    """
    looks = {0, steps, *(1 << power for power in range(steps.bit_length()))} if visits is None else set(visits)
    last = steps if visits is None else max(looks)
    latent = {name: working(base).clone() for name, base in stage.base.items()}
    optimizer = torch.optim.Adam(latent.values(), lr=lr)
    for step in range(last + 1):
        stage.put(lambda name, base: show(name, latent[name]))
        if step in looks:
            stage.evaluating()
            visit(step)
        if step == last:
            break
        _, gradients = stage.gradient(None if train is None else _at(train, step))
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            continue  # as a GradScaler does: the step is left out, and the weights stay numbers
        for name in latent:
            latent[name].grad = gradients.pop(name)  # gone before the next ones come
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        for name in latent:
            latent[name].copy_(keep(name, latent[name]))
            latent[name].grad = None
    return latent


def check_budget(steps: int, lr: float) -> None:
    """Raise unless a number of steps and a learning rate can be trained with."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be a whole number, 1 or more: got {steps!r}.")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"`lr` must be a positive number: got {lr!r}.")


def _at(train: Train, step: int) -> Loss:
    return lambda model: train(model, step)
