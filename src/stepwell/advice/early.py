"""The first part of a training run: straight-through training on a frozen grid, stopped after a tenth of its schedule."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from stepwell.probes.descent import descend
from stepwell.probes.grid import grid
from stepwell.probes.stage import Stage
from stepwell.quantizers import Encoded

Early = tuple[Callable[[nn.Module, int], Tensor], int]
SHARE = 0.1
FOUR_TERMS_STEP = 20  # at which the formula of an earlier study looks


def check_early(early: Early | None, rate: float, *, measure: bool) -> None:
    """Raise unless a rate, a training function and the length of its run can be trained with, where measuring is allowed."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"`rate` must be a positive number, the learning rate of the training run: got {rate!r}.")
    if early is None:
        return
    shape = "a pair of a function `train(model, step)`, which returns the loss on that step's batch, and the steps of the whole run"
    if not isinstance(early, tuple) or len(early) != 2 or not callable(early[0]):
        raise TypeError(f"`early` must be {shape}: got {early!r}.")
    if isinstance(early[1], bool) or not isinstance(early[1], int) or early[1] < 1:
        raise ValueError(f"`early` must be {shape}, 1 or more: got {early[1]!r} steps.")
    if not measure:
        raise ValueError(
            f"`early` must not be given with measure=False: got {early!r}. An early run is a measurement; leave one of them out."
        )


def early_losses(
    stage: Stage,
    train: Callable[[nn.Module, int], Tensor],
    encoded: Mapping[str, Encoded],
    look: Callable[[], float],
    *,
    steps: int,
    lr: float,
) -> dict[int, float]:
    """Return what `look` gives at the rounded weights after 20 steps, where they are that many, and after a tenth of the run.

    Args:
        stage: the model; weights that are not in `encoded` stay.
        train: loss of a step.
        encoded: the rounded weights that training starts from; their scales stay.
        look: called where the weights are then.
        steps: of the whole run; the rate follows its cosine.
        lr: Adam's.
    """
    last, found = max(math.ceil(SHARE * steps), 1), {}
    held = {name: grid(one, stage.base[name]) for name, one in encoded.items()}

    def visit(step: int) -> None:
        found[step] = look()

    def show(name: str, weight: Tensor) -> Tensor:
        return held[name].round(weight) if name in held else weight

    def keep(name: str, weight: Tensor) -> Tensor:
        return weight if name in held else stage.base[name]

    visits = [step for step in (FOUR_TERMS_STEP, last) if step <= last]
    descend(stage, train, steps=steps, lr=lr, show=show, keep=keep, visit=visit, visits=visits)
    return found
