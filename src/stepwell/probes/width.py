"""Width: how far the weights can move in a direction before the loss has grown by a tolerance (D2).

r(v) = sup{ t : L(w + t' v) <= L(w) + tolerance for all t' <= t }, found by growing t until the first crossing and bisecting there.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from stepwell.probes.points import Move, Weights, length, place
from stepwell.probes.points import toward as displacement
from stepwell.probes.stage import Cost, Loss, Stage, check_tolerance, staged
from stepwell.quantizers import Quantizer

FIRST, GROWTH, BISECTIONS, CAP = 1 / 64, 1.5, 8, 64.0


@dataclass(frozen=True)
class Width:
    """How far one direction stays within tolerance.

    Attributes:
        value: r, in lengths of the direction: 1 is its end. Infinite for a direction of length 0.
        error: half of the last interval: the crossing of the searched points lies within value +- error.
        capped: whether no crossing was found up to the cap; `value` is a lower limit then.
        length: Euclidean length of the direction, in weight units.
        start: loss at the model's own weights.
        tolerance: by how much it may grow.
        cost: passes over the data.
    """

    value: float
    error: float
    capped: bool
    length: float
    start: float
    tolerance: float
    cost: Cost

    @property
    def radius(self) -> float:
        """The width in weight units."""
        return self.value * self.length if self.length else math.inf

    @property
    def ratio(self) -> float:
        """1 / r: above 1 the end of the direction lies outside."""
        return 1 / self.value


def width(model: nn.Module, loss: Loss, *, toward: Weights | Quantizer, tolerance: float = 0.1) -> Width:
    """Return how far the model's weights can move towards a point, as a fraction of the way.

    Args:
        model: any module; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        toward: weights by name, encoded or plain; a Quantizer stands for the model's weights rounded to nearest.
        tolerance: growth of the loss that still counts as inside, above 0.

    Returns:
        The width; 10 to 31 forward passes.

    Raises:
        TypeError, ValueError: as `segment`, and a tolerance that is not positive.

    >>> import torch
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[0.0]])
    >>> found = width(layer, lambda m: m.weight.square().sum(), toward={"weight": torch.tensor([[4.0]])}, tolerance=1.0)
    >>> round(found.value, 3)  # (4 t)^2 = 1
    0.25
    """
    check_tolerance(tolerance)
    target = place(model, toward, "toward")
    with staged(model, loss, target) as stage:
        return replace(along(stage, displacement(target), tolerance), cost=stage.cost)


def along(stage: Stage, direction: Move, tolerance: float, *, near: float | None = None) -> Width:
    """Return the width of a direction, which is asked for anew at every point, so that it needs no memory.

    Args:
        stage: the model.
        direction: `(name, weight)` -> displacement.
        tolerance: growth of the loss that still counts as inside.
        near: a radius that a similar direction had, in weight units: the search begins at a quarter of it instead of close to zero, which
            saves a third of the passes. A crossing before that, after which the loss falls again, would be missed.
    """
    before, size = stage.cost.forward, length(direction, stage.base)
    first = FIRST if near is None or not size else min(max(near / size / 4, FIRST), CAP)
    value, error, capped = _crossing(stage, direction, stage.start + tolerance, first) if size else (math.inf, 0.0, True)
    return Width(value, error, capped, size, stage.start, tolerance, Cost(stage.cost.forward - before))


def _crossing(stage: Stage, direction: Move, limit: float, first: float) -> tuple[float, float, bool]:
    """Return the first crossing, half of the interval it is known to, and whether there was none."""

    def inside(t: float) -> bool:
        stage.put(lambda name, base: torch.add(base, direction(name, base), alpha=t))
        return stage.loss() <= limit

    low, high = 0.0, first
    while inside(high):
        if high >= CAP:
            return CAP, 0.0, True
        low, high = high, min(high * GROWTH, CAP)
    if low == 0.0 and first > FIRST:  # the guess was too large
        return _crossing(stage, direction, limit, FIRST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return (low + high) / 2, (high - low) / 2, False
