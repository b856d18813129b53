"""Training: a model's weights onto the plan's grids by training on the user's data, for as many steps as were asked for."""

import math
from typing import Literal

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from stepwell.methods.lotion import lotion
from stepwell.methods.ste import ste
from stepwell.quantizers import Encoded
from stepwell.run.attach import Run, attach
from stepwell.ship.plan import Plan
from stepwell.ship.rounding import Progress
from stepwell.ship.source import Source
from stepwell.train.quantize import quantize_training

Trained = Literal["ste", "lotion", "default"]
RATE_FOLDER, RATE_FUNCTION = 2e-4, 1e-3  # learning rates where none was given: of a language model, and of networks of one's own


def rate_of(source: Source) -> float:
    """Return the learning rate that is taken where none was given."""
    return RATE_FUNCTION if source.checkpoint is None else RATE_FOLDER


def train(source: Source, plan: Plan, method: Trained, *, steps: int, rate: float, seed: int, progress: Progress) -> dict[str, Encoded]:
    """Train a source's model on its learning batches, over and over, and return the weights encoded; the model holds them.

    All parameters are trained, by AdamW without weight decay, under a rate that falls to zero along a cosine.

    Args:
        source: the model, its loss and its data.
        plan: the grids.
        method: straight-through training, LOTION, or the recipe of `quantize_training`.
        steps: optimizer steps, one batch each.
        rate: the learning rate at the start.
        seed: of every random draw.
        progress: told every step.

    Raises:
        ValueError: a loss that stops being finite; names the step.
    """
    torch.manual_seed(seed)  # dropout
    model = source.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    run = _attached(source, plan, method, optimizer, steps, seed)
    schedule = CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = source.loss(model, source.learning[step % len(source.learning)])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"`rate`: the loss is {value} at step {step + 1} with a learning rate of {rate:g}. Try a third of it.")
        progress(f"training, loss {value:.4g}", step, steps)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    progress("trained", steps, steps)
    encoded = run.finalize()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return encoded


def _attached(source: Source, plan: Plan, method: Trained, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Run:
    """Put the method on the model."""
    terms = source.terms
    if method == "default":
        return quantize_training(source.model, optimizer, plan.choices, steps=steps, loss_terms=terms, seed=seed)
    made = {name: ste(grid) if method == "ste" else lotion(grid, loss_terms=terms) for name, grid in plan.grids.items()}
    return attach(source.model, {**made, "*": None}, optimizer, seed=seed)
