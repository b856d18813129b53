"""Session: a model with its optimizer and its method, and the step that it takes.

Nothing here knows how a method works: it is attached to the model, and the loop is anyone's.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stepwell.optim.adamw import AdamW
from stepwell.run.attach import Run, attach
from stepwell.train.blame import DivergedError, culprit
from stepwell.train.language import row_losses
from stepwell.train.ranks import Ranks, forward_of, prepare, synchronising, whole
from stepwell.train.recipe import Recipe
from stepwell.train.tokens import Tokens, batch


class Session(NamedTuple):
    """What trains.

    Attributes:
        model: on its device; the Run lives on it.
        forward: the model, wrapped where processes hold copies of it, compiled where the recipe says so.
        optimizer: its state carries the Run.
        run: the method; None in full precision.
        recipe, tokens, ranks: as given.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: AdamW
    run: Run | None
    recipe: Recipe
    tokens: Tokens
    ranks: Ranks


def begin(recipe: Recipe, model: nn.Module, tokens: Tokens, ranks: Ranks) -> Session:
    """Put a model on its device, share it out, and attach the recipe's method to it and its optimizer."""
    model = prepare(model, ranks)
    model.train()
    optimizer = make_optimizer(model, recipe)
    method = recipe.made_method()
    run = None if method is None else attach(model, method, optimizer, skip=recipe.skip, seed=recipe.seed)
    forward: Any = forward_of(model, ranks)
    forward = torch.compile(forward) if recipe.compile else forward
    return Session(model, forward, optimizer, run, recipe, tokens, ranks)


def make_optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    """Return AdamW with the recipe's numbers; vectors, which are norms and biases, do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)


def advance(session: Session, step: int) -> dict[str, float]:
    """Take the optimizer step that `step` steps were done before, and return its loss and the norm of its gradient.

    The loss is the mean over all loss terms of the step, whatever the micro-batches and processes: each adds its sum over their count.

    Raises:
        DivergedError: a loss or gradient that is not finite; the step is not taken.
    """
    recipe, ranks, optimizer = session.recipe, session.ranks, session.optimizer
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate(step)
    torch.manual_seed(_mixed(recipe.seed, step, ranks.rank))  # of dropout, where a model has it
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    micros = list(_micro_batches(session, step))
    for number, tokens in enumerate(micros):
        with synchronising(session.forward, last=number == len(micros) - 1):
            loss = row_losses(session.forward, tokens, recipe.precision).sum() / recipe.loss_terms
            (loss * ranks.size).backward()  # type: ignore[no-untyped-call]  # processes average their gradients
        total += loss.detach()
    gradients = [parameter.grad for parameter in session.model.parameters() if parameter.grad is not None]
    norm = whole(get_total_norm(gradients))
    measured = {"loss": float(ranks.total(total)), "gradient_norm": float(norm)}
    if not all(math.isfinite(value) for value in measured.values()):
        place = culprit(session.model, micros, recipe, ranks)
        raise DivergedError(
            f"step {step + 1}: the loss is {measured['loss']:g}, the gradient's norm {measured['gradient_norm']:g}. The first number that "
            f"is not finite is in {place}."
        )
    clip_grads_with_norm_([p for p in session.model.parameters() if p.grad is not None], recipe.clip, norm)
    optimizer.step()
    return measured


def _micro_batches(session: Session, step: int) -> Iterator[Tensor]:
    """Yield this process's rows of a step, `(rows, length + 1)` each; the last may have fewer."""
    recipe = session.recipe
    rows = session.ranks.rows(recipe.rows)
    for first in range(0, len(rows), recipe.micro):
        some = rows[first : first + recipe.micro]
        tokens = batch(session.tokens.train, some, step=step, size=recipe.rows, length=recipe.length, seed=recipe.seed)
        yield tokens.to(session.ranks.device, non_blocking=True)


def _mixed(*numbers: int) -> int:
    """Return a seed that depends on all of some numbers."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:8], "little") >> 1
