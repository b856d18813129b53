"""Inward: does the gradient at the quantized weights point back to where the loss is low (D4)?

Symbols: b = reference (the float weights that training began with), w = latent weights, q = quantized weights, v = b - q;
c_q = cos(-grad L(q), v), c_w = cos(-grad L(w), v), p_q = -grad L(q) . v / |v|.
On any convex slice c_q is positive, inside and outside: the sign alone shows no wall. Look at p_q, at c_w at the same point, and at the
size that a random direction would have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from stepwell.probes.grid import grid
from stepwell.probes.points import Place, Weights, dot, matching, place, weight, working
from stepwell.probes.stage import Cost, Loss, Stage, check_tolerance, staged
from stepwell.quantizers import Encoded, Quantizer


@dataclass(frozen=True)
class Inward:
    """Gradients at the latent and the quantized weights against the way back to the reference; exact for the given data.

    Attributes:
        cosine: c_q, of the descent direction at the quantized weights; NaN where a vector is zero.
        latent_cosine: c_w, of the descent direction at the latent weights, with the same way back.
        projection: p_q, fall of the loss per weight unit on that way.
        random: 1 / sqrt(number of weights), the size of a cosine with a random direction.
        loss, latent_loss, start: L(q), L(w) and L(b); `start` is what was given as baseline.
        outside: whether L(q) exceeds `start` by more than the tolerance.
        distance: |w - b|.
        changed: share of codes that differ from the reference rounded on the same grid; NaN where q is not encoded.
        cost: passes over the data.
    """

    cosine: float
    latent_cosine: float
    projection: float
    random: float
    loss: float
    latent_loss: float
    start: float
    outside: bool
    distance: float
    changed: float
    cost: Cost


@dataclass(frozen=True)
class Contrast:
    """What many points say together; NaN where there are none of a kind.

    Attributes:
        points, outside: how many, and how many of them outside.
        inward_outside, inward_inside: share with c_q > 0.
        latent_outside, latent_inside: share with c_w > 0.
        stronger_outside: share of outside points with c_q > c_w.
        auc_cosine, auc_projection: probability that c_q, or p_q, is larger at an outside point than at an inside one.
    """

    points: int
    outside: int
    inward_outside: float
    inward_inside: float
    latent_outside: float
    latent_inside: float
    stronger_outside: float
    auc_cosine: float
    auc_projection: float


def inward(
    model: nn.Module,
    loss: Loss,
    *,
    at: Weights | Quantizer,
    toward: Weights | None = None,
    baseline: float | None = None,
    tolerance: float = 0.1,
) -> Inward:
    """Return how far the descent directions at the latent and the quantized weights point back to a reference.

    During a training run, call it under `with run.latent()`; the model holds w there.

    Args:
        model: holds the latent weights w; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor. A noisy minibatch hides the direction.
        at: the quantized weights q by name; a Quantizer rounds the model's to nearest.
        toward: the reference b, a state dictionary for instance; None is w itself, which is right before the first step.
        baseline: the loss that "outside" is measured from; None evaluates the reference.
        tolerance: growth of the loss that still counts as inside, above 0.

    Returns:
        The cosines, losses and distances; two backward and four forward passes, one more with `toward` and no `baseline`.

    Raises:
        TypeError, ValueError: as `segment`, a loss without a graph, a tolerance that is not positive, a baseline that is not finite.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[0.0, 0.0]])
    >>> inward(layer, lambda m: m.weight.square().sum(), at={"weight": torch.tensor([[3.0, 4.0]])}).projection  # |grad| = 2 * 5
    10.0
    """
    check_tolerance(tolerance)
    if baseline is not None and not math.isfinite(baseline):
        raise ValueError(f"`baseline` must be finite: got {baseline}.")
    quantized = place(model, at, "at")
    reference: Place = dict.fromkeys(quantized) if toward is None else matching(model, toward, "toward", quantized)
    with staged(model, loss, quantized) as stage:
        latent_loss, latent = against(stage, quantized, reference)
        stage.put(lambda name, base: weight(quantized[name], base))
        here, back = against(stage, quantized, reference)
        if baseline is None and any(value is not None for value in reference.values()):
            stage.put(lambda name, base: weight(reference[name], base))
            baseline = stage.loss()
        start = stage.start if baseline is None else baseline
        return Inward(
            cosine=back.cosine,
            latent_cosine=latent.cosine,
            projection=back.projection,
            random=stage.elements**-0.5,
            loss=here,
            latent_loss=latent_loss,
            start=start,
            outside=here > start + tolerance,
            distance=_distance(stage, reference),
            changed=_changed(stage, quantized, reference),
            cost=stage.cost,
        )


class _Point(Protocol):
    """What `contrast` reads off a point: a result of `inward`, or a look of a `Log`."""

    @property
    def cosine(self) -> float: ...
    @property
    def latent_cosine(self) -> float: ...
    @property
    def projection(self) -> float: ...
    @property
    def outside(self) -> bool: ...


def contrast(points: Sequence[_Point]) -> Contrast:
    """Return what the points of one or many runs say together: shares outside and inside, and how well size tells them apart.

    Args:
        points: from `inward`, or the looks of a `Log`.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("`points` must hold at least one result of `inward`: got none.")
    out = [point for point in points if point.outside]
    rest = [point for point in points if not point.outside]
    return Contrast(
        points=len(points),
        outside=len(out),
        inward_outside=_share([point.cosine > 0 for point in out]),
        inward_inside=_share([point.cosine > 0 for point in rest]),
        latent_outside=_share([point.latent_cosine > 0 for point in out]),
        latent_inside=_share([point.latent_cosine > 0 for point in rest]),
        stronger_outside=_share([point.cosine > point.latent_cosine for point in out]),
        auc_cosine=auc([point.cosine for point in out], [point.cosine for point in rest]),
        auc_projection=auc([point.projection for point in out], [point.projection for point in rest]),
    )


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the probability that a positive's value is larger than a negative's, ties counted half; NaN without one of the two.

    >>> auc([2.0, 3.0], [1.0, 2.0])
    0.875
    """
    if not positive or not negative:
        return math.nan
    wins = sum((one > two) + 0.5 * (one == two) for one in positive for two in negative)
    return wins / (len(positive) * len(negative))


class Angle(NamedTuple):
    """A descent direction against a way: the cosine between them, and the fall of the loss per weight unit on it."""

    cosine: float
    projection: float


def against(stage: Stage, quantized: Place, reference: Place) -> tuple[float, Angle]:
    """Return the loss where the weights are now, and its descent direction against the way from q to b."""
    along = size = way = 0.0

    def take(name: str, gradient: Tensor) -> None:
        nonlocal along, size, way
        base = working(stage.base[name])
        back = weight(reference[name], base) - weight(quantized[name], base)
        along -= dot(gradient, back)
        size += dot(gradient, gradient)
        way += dot(back, back)

    value = stage.gradients(take)
    if not size or not way:
        return value, Angle(math.nan, 0.0 if way else math.nan)
    return value, Angle(along / math.sqrt(size * way), along / math.sqrt(way))


def _distance(stage: Stage, reference: Place) -> float:
    """Return the length of the way from the latent weights to the reference."""
    parts = ((weight(reference[name], base) - base) for name, base in ((name, working(base)) for name, base in stage.base.items()))
    return math.sqrt(sum(dot(part, part) for part in parts))


def _changed(stage: Stage, quantized: Place, reference: Place) -> float:
    """Return the share of codes that are not the nearest ones to the reference."""
    changed = 0
    for name, value in quantized.items():
        if not isinstance(value, Encoded):
            return math.nan
        base = working(stage.base[name])
        held = grid(value, base)
        changed += int((held.indices(value) != held.nearest(weight(reference[name], base))).sum())
    return changed / stage.elements


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else math.nan
