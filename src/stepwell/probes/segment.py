"""Segment: the loss along the straight line between two points, usually from the float weights to rounded or trained ones (D1).

Symbols: S(a) = L(x + a (y - x)); barrier = max over a <= 1 of S, minus the larger of S(0) and S(1); defect = the most that S falls below
its running maximum, zero for a line that only rises.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stepwell.probes.points import Place, Weights, matching, place, weight
from stepwell.probes.stage import Cost, Loss, staged
from stepwell.quantizers import Encoded, Quantizer

POSITIONS = tuple(k / 10 for k in range(16))


@dataclass(frozen=True)
class Segment:
    """The loss along a line; exact for the given data, so there is no standard error.

    Attributes:
        positions: a; 0 is the start, 1 the target.
        losses: S(a), with BatchNorm statistics frozen.
        start: the loss at the model's own weights.
        final: the loss at the target with BatchNorm statistics re-estimated there; without BatchNorm it is S(1).
        barrier: how far the line rises above both its ends, 0 or more.
        defect: how far it falls after rising.
        cost: passes over the data.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    final: float
    barrier: float
    defect: float
    cost: Cost

    @property
    def exponent(self) -> float:
        """Power p of a fit S(a) - S(0) ~ a^p over 0 < a <= 1 (2 for a quadratic); NaN where the line does not rise throughout."""
        rise = [(a, loss - self.losses[0]) for a, loss in zip(self.positions, self.losses, strict=True) if 0 < a <= 1]
        if self.positions[0] != 0 or len(rise) < 2 or not all(0 < value < math.inf for _, value in rise):
            return math.nan
        x, y = torch.tensor(rise, dtype=torch.float64).log().T
        return float(((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum())


def segment(
    model: nn.Module,
    loss: Loss,
    *,
    toward: Weights | Quantizer,
    start: Weights | None = None,
    positions: Sequence[float] = POSITIONS,
) -> Segment:
    """Return the loss along the line from one point to another.

    Args:
        model: any module; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        toward: the end of the line: weights by name, encoded or plain; a Quantizer stands for the model's weights rounded to nearest.
        start: where the line begins, a state dictionary for instance; None is the model's own weights.
        positions: strictly rising, 0 and 1 among them.

    Returns:
        The profile. Costs a forward pass per position and two more, twice two more with BatchNorm.

    Raises:
        TypeError: weights that are neither encoded nor tensors, a loss that is no function or returns no tensor.
        ValueError: nothing to move, names or shapes that do not fit, positions out of order, encoded ends with different scales, a loss
            that is not scalar, not finite or not deterministic.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0]])
    >>> line = segment(layer, lambda m: m.weight.square().sum(), toward={"weight": torch.tensor([[3.0]])}, positions=(0, 0.5, 1))
    >>> line.losses, line.barrier
    ((1.0, 4.0, 9.0), 0.0)
    """
    grid = tuple(map(float, positions))
    if not {0.0, 1.0} <= set(grid) or any(not one < two for one, two in itertools.pairwise(grid)) or not all(map(math.isfinite, grid)):
        raise ValueError(f"`positions` must rise strictly and contain 0 and 1: got {grid}.")
    end = place(model, toward, "toward")
    begin: Place = dict.fromkeys(end) if start is None else matching(model, start, "start", end)
    _refuse_other_scales(begin, end)
    with staged(model, loss, end) as stage:
        losses = []
        for a in grid:
            stage.put(lambda name, base, a=a: torch.lerp(weight(begin[name], base), weight(end[name], base), a))  # type: ignore[misc]
            losses.append(stage.loss())
        stage.put(lambda name, base: weight(end[name], base))
        final = stage.settled()
        highest = max(value for a, value in zip(grid, losses, strict=True) if a <= 1)
        ends = (losses[grid.index(0.0)], losses[grid.index(1.0)])
        defect = max(top - value for top, value in zip(itertools.accumulate(losses, max), losses, strict=True))
        return Segment(grid, tuple(losses), stage.start, final, highest - max(ends), defect, stage.cost)


def _refuse_other_scales(begin: Place, end: Place) -> None:
    """Between grids with different scales there is nothing to interpolate: the line would mix a change of codes with one of units."""
    for name, one in begin.items():
        other = end[name]
        if isinstance(one, Encoded) and isinstance(other, Encoded) and not torch.equal(one.scales.to(other.scales), other.scales):
            raise ValueError(
                f"`start` and `toward` must share their scales: got different ones for {name!r}. Freeze the scales while training, or pass "
                "`encoded.decode()` to compare the weights all the same."
            )
