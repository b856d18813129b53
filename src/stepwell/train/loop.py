"""A plain training loop, such as any user has: nothing in it knows about quantization."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stepwell.train.data import Images


class Score(NamedTuple):
    """Mean cross entropy in nats per image, and the share of images whose largest logit is the right one."""

    loss: float
    accuracy: float


def image_loss(model: nn.Module, images: Images) -> Tensor:
    """Return the mean cross entropy of a model's logits for images, 0-dim."""
    return cross_entropy(model(images.pixels), images.labels)


def fit(
    model: nn.Module,
    data: Iterable[Any],
    *,
    optimizer: Optimizer,
    loss: Callable[[nn.Module, Any], Tensor] = image_loss,
    scheduler: LRScheduler | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train on every batch once and return the loss of each.

    Args:
        model: changed in place.
        data: batches; one optimizer step each.
        optimizer: holds the model's parameters. A `Run` attached to it needs nothing from this loop.
        loss: `loss(model, batch)`, a mean; for images the cross entropy in nats.
        scheduler: stepped after each optimizer step.
        after_step: called with the number of steps done, for instance to evaluate under `run.deployed()`.
    """
    model.train()
    losses = []
    for step, batch in enumerate(data, start=1):
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.detach())
        if after_step is not None:
            after_step(step)
    return torch.stack(losses).tolist() if losses else []


def evaluate(model: nn.Module, images: Images) -> Score:
    """Return the model's loss and accuracy on images, with the weights as they are now."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(images.pixels)
        score = Score(cross_entropy(logits, images.labels).item(), (logits.argmax(1) == images.labels).double().mean().item())
    model.train(training)
    return score
