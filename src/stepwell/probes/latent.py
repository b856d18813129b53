"""Latent: where training with rounded weights has left the weights behind the rounding (D7).

Symbols: b = weights before training, w = latent weights after it, q = deployed weights, r = b rounded on q's grid;
compensation = cos(w - b, -(r - b)): above 0 the latent weights have moved against the rounding error, to make up for it.
Clipping moves weights by itself: compare with the loss at b clipped to the grid's range.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from stepwell.probes.grid import grid
from stepwell.probes.neighbours import encoded_place
from stepwell.probes.points import Place, Weights, dot, matching, place, weight, working
from stepwell.probes.stage import Cost, Loss, Stage, staged
from stepwell.quantizers import Encoded, Quantizer


@dataclass(frozen=True)
class Latent:
    """Losses and distances of latent, deployed and original weights; exact for the given data.

    Attributes:
        start, rounded_loss: loss at b, and at b rounded on the grid.
        clipped_loss: loss at b clipped to the grid's range.
        latent_loss, loss: loss at the latent weights, and at the deployed ones, BatchNorm statistics as the model holds them.
        final: loss at the deployed weights with BatchNorm statistics re-estimated for them.
        compensation: cos(w - b, -(r - b)); NaN where one of them is zero.
        distance, rounded_distance, latent_distance: |q - b|, |r - b| and |w - b|.
        changed: share of codes that differ from r's.
        near: share of codes at most one step from r's.
        farthest: largest move of a code from r's, in steps.
        cost: passes over the data.
    """

    start: float
    rounded_loss: float
    clipped_loss: float
    latent_loss: float
    loss: float
    final: float
    compensation: float
    distance: float
    rounded_distance: float
    latent_distance: float
    changed: float
    near: float
    farthest: int
    cost: Cost


def latent(model: nn.Module, loss: Loss, *, at: Weights | Quantizer, start: Weights) -> Latent:
    """Compare the latent weights that a model holds with the deployed ones and with those that training began with.

    During a training run, call it under `with run.latent()`; after one, on the model that `run.detach()` leaves.

    Args:
        model: holds the latent weights w; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        at: the deployed weights q, encoded, by name; a Quantizer rounds the model's to nearest.
        start: the weights b before training, a state dictionary for instance.

    Returns:
        Losses, distances and moved codes; seven forward passes, one more with BatchNorm.

    Raises:
        TypeError, ValueError: as `segment`, and plain tensors in `at`.
    """
    deployed = encoded_place(place(model, at, "at"), "at")
    before = matching(model, start, "start", dict(deployed))
    with staged(model, loss, deployed) as stage:
        losses = []
        for point in (
            lambda name, base: weight(before[name], base),
            lambda name, base: grid(deployed[name], base).round(weight(before[name], base)),
            lambda name, base: grid(deployed[name], base).clip(weight(before[name], base)),
        ):
            stage.put(point)
            losses.append(stage.loss())
        stage.put(lambda name, base: weight(deployed[name], base))
        here = stage.loss()
        moved = moves(stage, deployed, before)
        return Latent(
            start=losses[0],
            rounded_loss=losses[1],
            clipped_loss=losses[2],
            latent_loss=stage.start,
            loss=here,
            final=stage.settled(),
            compensation=moved.compensation,
            distance=moved.distance,
            rounded_distance=moved.rounded_distance,
            latent_distance=moved.latent_distance,
            changed=moved.changed,
            near=moved.near,
            farthest=moved.farthest,
            cost=stage.cost,
        )


class Moves(NamedTuple):
    """How far codes and weights are from where training began; fields as in `Latent`, `steps` the mean move of a code."""

    compensation: float
    distance: float
    rounded_distance: float
    latent_distance: float
    changed: float
    near: float
    farthest: int
    steps: float


def moves(stage: Stage, deployed: dict[str, Encoded], before: Place) -> Moves:
    """Compare codes and weights with those before training, on the grid of the deployed ones."""
    changed = far = farthest = total = 0
    along, sums = 0.0, [0.0, 0.0, 0.0]
    for name, encoded in deployed.items():
        base = working(stage.base[name])
        held, origin = grid(encoded, base), weight(before[name], base)
        steps = (held.indices(encoded) - held.nearest(origin)).abs()
        changed, far, farthest = changed + int((steps > 0).sum()), far + int((steps > 1).sum()), max(farthest, int(steps.max()))
        total += int(steps.sum())
        rounding = held.round(origin) - origin
        along += dot(base - origin, rounding)
        for k, part in enumerate((weight(encoded, base) - origin, rounding, base - origin)):
            sums[k] += dot(part, part)
    return Moves(
        compensation=-along / math.sqrt(sums[1] * sums[2]) if sums[1] and sums[2] else math.nan,
        distance=math.sqrt(sums[0]),
        rounded_distance=math.sqrt(sums[1]),
        latent_distance=math.sqrt(sums[2]),
        changed=changed / stage.elements,
        near=1 - far / stage.elements,
        farthest=farthest,
        steps=total / stage.elements,
    )
