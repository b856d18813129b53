"""Box QAT: straight-through training whose codes may not leave the neighbourhood of the rounded weights (D5).

Where it ends within tolerance, a low-loss grid point near the rounded weights has been shown to exist; where not, nothing has been shown.
Scales are frozen: with refitted ones "one step" would have no meaning.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepwell.probes.descent import LR, STEPS, Train, check_budget, descend
from stepwell.probes.grid import Grid, grid
from stepwell.probes.neighbours import encoded_place
from stepwell.probes.points import Weights, place, working
from stepwell.probes.stage import Cost, Loss, Stage, check_tolerance, staged
from stepwell.quantizers import Encoded, Quantizer

EDGE = 0.49  # of a step: latent weights stay short of the threshold to the next value


@dataclass(frozen=True)
class Trained:
    """Where training with frozen scales ended; exact for the given data, but one run of one schedule.

    Attributes:
        found: deployed weights, encoded, on the grid of where training began.
        latent: the weights behind them, by name.
        start: loss at the model's own weights, before rounding.
        before, loss: loss at the rounded weights that training began with, and at `found`.
        final: loss at `found` with BatchNorm statistics re-estimated for it.
        held_out_before, held_out: as `before` and `loss` on held-out data; NaN without.
        within: whether `loss` is within tolerance of `start`.
        entry: first visited step with a loss within tolerance; None where there was none. Later steps may leave again.
        changed: share of codes that differ from where training began.
        history: (steps done, loss) at 0, 1, 2, 4, 8, .. and the end.
        cost: passes over the data, those on held-out data and training batches included.
    """

    found: dict[str, Encoded]
    latent: dict[str, Tensor]
    start: float
    before: float
    loss: float
    final: float
    held_out_before: float
    held_out: float
    within: bool
    entry: int | None
    changed: float
    history: tuple[tuple[int, float], ...]
    cost: Cost


def box_qat(
    model: nn.Module,
    loss: Loss,
    *,
    around: Weights | Quantizer,
    train: Train | None = None,
    held_out: Loss | None = None,
    steps: int = STEPS,
    lr: float = LR,
    reach: int | None = 1,
    tolerance: float = 0.1,
) -> Trained:
    """Train the weights through rounding, with codes at most `reach` steps from the rounded model's, and return where it ends.

    Args:
        model: holds the float weights; left exactly as found, nothing but the named weights is trained.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        around: the rounded weights, encoded, by name; a Quantizer rounds the model's to nearest.
        train: `train(model, step)` returns the loss on that step's batch; None trains on `loss` itself.
        held_out: as `loss` on data that training does not see; evaluated at both ends.
        steps: of Adam.
        lr: its learning rate, annealed to zero by a cosine.
        reach: how far a code may move, in steps of the grid; None is plain straight-through training on the frozen grid.
        tolerance: growth of the loss that still counts as low, above 0.

    Returns:
        The end point. `steps` forward and backward passes and about log2(steps) + 6 forward passes more.

    Raises:
        TypeError, ValueError: as `neighbours`; steps, rate or reach out of range.
    """
    check_tolerance(tolerance)
    check_budget(steps, lr)
    if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int) or reach < 1):
        raise ValueError(f"`reach` must be a whole number of grid steps, 1 or more, or None: got {reach!r}.")
    centre = encoded_place(place(model, around, "around"), "around")
    with staged(model, loss, centre) as stage:
        return _trained(stage, centre, _Plan(train, held_out, steps, lr, reach), tolerance)


class _Plan(NamedTuple):
    """How to train."""

    train: Train | None
    held_out: Loss | None
    steps: int
    lr: float
    reach: int | None


def _trained(stage: Stage, centre: dict[str, Encoded], plan: _Plan, tolerance: float) -> Trained:
    """Train and judge the end point."""
    held = {name: grid(encoded, working(stage.base[name])) for name, encoded in centre.items()}
    history: list[tuple[int, float]] = []
    outside: list[float] = []

    def visit(step: int) -> None:
        history.append((step, stage.loss()))
        if plan.held_out is not None and step in (0, plan.steps):
            outside.append(stage.other(plan.held_out))

    def keep(name: str, weight: Tensor) -> Tensor:
        return weight if plan.reach is None else _inside(weight, centre[name], held[name], plan.reach)

    def show(name: str, weight: Tensor) -> Tensor:
        return held[name].round(weight)

    latent = descend(stage, plan.train, steps=plan.steps, lr=plan.lr, show=show, keep=keep, visit=visit)
    found = {name: held[name].encode(held[name].nearest(latent[name]), centre[name]) for name in centre}
    moved = sum(int((found[name].codes != centre[name].codes).sum()) for name in centre)
    limit = stage.start + tolerance
    return Trained(
        found=found,
        latent=latent,
        start=stage.start,
        before=history[0][1],
        loss=history[-1][1],
        final=stage.settled(),
        held_out_before=outside[0] if outside else math.nan,
        held_out=outside[-1] if outside else math.nan,
        within=history[-1][1] <= limit,
        entry=next((step for step, value in history if value <= limit), None),
        changed=moved / stage.elements,
        history=tuple(history),
        cost=stage.cost,
    )


def _inside(weight: Tensor, centre: Encoded, held: Grid, reach: int) -> Tensor:
    """Return latent weights moved to where they round to values at most `reach` steps from the centre's."""
    index = held.indices(centre)
    ends = []
    for direction in (-1, 1):
        end = (index + direction * reach).clamp(0, held.top)
        value = held.unrounded(end)
        gaps = [(held.unrounded((end + side).clamp(0, held.top)) - value).abs() for side in (-1, 1)]
        one, two = (gap.masked_fill(gap == 0, torch.inf) for gap in gaps)
        gap = torch.minimum(one, two).nan_to_num(posinf=0.0)
        ends.append((value - EDGE * gap, value + EDGE * gap))
    low = torch.minimum(ends[0][0], ends[1][0])  # a negative scale turns the grid over
    return weight.clamp(low, torch.maximum(ends[0][1], ends[1][1]))
