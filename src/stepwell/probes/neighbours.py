"""Neighbours: is there a low-loss grid point near the rounded weights? A search that moves codes by one step (D5).

A low loss that is found is a proof; a search that fails proves nothing. The search sees the data of `loss` and fits it, so judge the result
on held-out data. Search: at each round take the gradient, let every index step against its sign where the box and the range allow, rank by
first-order gain, move the best m together; keep what lowers the loss and double m (at most a twentieth of all), else halve it.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stepwell.probes.grid import Grid, grid
from stepwell.probes.points import Place, Weights, place, working
from stepwell.probes.stage import Cost, Loss, Stage, check_tolerance, staged
from stepwell.quantizers import Encoded, Quantizer

ROUNDS, LARGEST_SHARE, FIRST_SHARE = 40, 0.05, 0.01


@dataclass(frozen=True)
class Neighbours:
    """The best grid point that a search found; exact for the given data.

    Attributes:
        found: encoded weights of that point, on the grid of where the search began.
        start: loss at the model's own weights, before rounding.
        before, loss: loss where the search began, and at the point found.
        held_out_before, held_out: the same on held-out data; NaN without.
        within: whether `loss` is within tolerance of `start`: a proof that such a point exists. False means "not found".
        changed: share of codes that differ from where the search began.
        history: the loss after every accepted move, first where it began.
        cost: passes over the data, those on held-out data included.
    """

    found: dict[str, Encoded]
    start: float
    before: float
    loss: float
    held_out_before: float
    held_out: float
    within: bool
    changed: float
    history: tuple[float, ...]
    cost: Cost

    def __str__(self) -> str:
        verdict = "found a grid point" if self.within else "found no grid point"
        return (
            f"{verdict} within tolerance in {self.cost.forward} evaluations: {self.before:.4g} -> {self.loss:.4g}, float {self.start:.4g}"
        )


def neighbours(
    model: nn.Module,
    loss: Loss,
    *,
    around: Weights | Quantizer,
    held_out: Loss | None = None,
    tolerance: float = 0.1,
    reach: Literal["box", "corners"] = "box",
    rounds: int = ROUNDS,
) -> Neighbours:
    """Search the grid points at most one step from a rounded model for one with low loss.

    Args:
        model: holds the float weights; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        around: where the search begins, encoded, by name; a Quantizer rounds the model's weights to nearest.
        held_out: the same on data that the search does not see; evaluated at both ends.
        tolerance: growth of the loss over the model's own that still counts as low, above 0.
        reach: "box" is one step up and down; "corners" only the two grid values around each weight of the model, as AdaRound.
        rounds: gradients to take at most.

    Returns:
        The point with its losses. About 40 forward and backward passes and 60 to 100 forward passes more. Beside the copy of the weights
        it holds one byte per weight, how far its code has moved, and the gains of the steps that a round may take, a twentieth of all.

    Raises:
        TypeError, ValueError: as `segment`, plain tensors in `around`, a loss without a graph, options out of range.

    >>> from stepwell.formats import integer
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[0.42, 0.36]])
    >>> away = lambda m: (m.weight.sum() - 0.78).abs()  # rounding both down is .78 off, rounding one of them up only .22
    >>> neighbours(layer, away, around=Quantizer(integer(2), rule=1.0)).found["weight"].codes
    tensor([[1, 0]], dtype=torch.int8)
    """
    check_tolerance(tolerance)
    if reach not in ("box", "corners"):
        raise ValueError(f"`reach` must be 'box' or 'corners': got {reach!r}.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"`rounds` must be a whole number, 0 or more: got {rounds!r}.")
    centre = encoded_place(place(model, around, "around"), "around")
    with staged(model, loss, centre) as stage:
        search = _Search(stage, centre, reach)
        search.show()
        history = [stage.loss()]
        held_out_before = math.nan if held_out is None else stage.other(held_out)
        if math.isfinite(history[0]):
            search.run(history, rounds)
        changed = sum(int((move != 0).sum()) for move in search.moves.values()) / stage.elements
        return Neighbours(
            found=search.encoded_(),
            start=stage.start,
            before=history[0],
            loss=history[-1],
            held_out_before=held_out_before,
            held_out=math.nan if held_out is None else stage.other(held_out),
            within=history[-1] <= stage.start + tolerance,
            changed=changed,
            history=tuple(history),
            cost=stage.cost,
        )


def encoded_place(given: Place, argument: str) -> dict[str, Encoded]:
    """Return a point whose weights all have a grid, or refuse it."""
    found = {}
    for name, value in given.items():
        if not isinstance(value, Encoded):
            raise TypeError(f"`{argument}` must be encoded: got {type(value).__name__} for {name!r}, which has no grid. Use a Quantizer.")
        found[name] = value
    return found


class _Search:
    """Indices that have moved from a centre, one signed byte per weight, and the model that shows them."""

    def __init__(self, stage: Stage, centre: dict[str, Encoded], reach: str) -> None:
        self._stage, self._centre, self._reach = stage, centre, reach
        self.moves = {name: torch.zeros(base.shape, dtype=torch.int8, device=base.device) for name, base in stage.base.items()}
        self._largest = max(1, int(LARGEST_SHARE * stage.elements))

    def show(self) -> None:
        """Write the moved grid values into the model."""
        self._stage.put(lambda name, base: self._values(name, base))

    def run(self, history: list[float], rounds: int) -> None:
        """Move indices while the loss falls; the model ends at the best point."""
        count = min(self._largest, max(1, int(FIRST_SHARE * self._stage.elements)))
        for _ in range(rounds):
            steps = self._steps()
            while count:
                chosen = steps.first(count)
                if not len(chosen.places):
                    return
                self._step(chosen, 1)
                value = self._stage.loss()
                if value < history[-1]:
                    history.append(value)
                    count = min(2 * count, self._largest)
                    break
                self._step(chosen, -1)
                count = min(count, len(chosen.places)) // 2
            if not count:
                return

    def encoded_(self) -> dict[str, Encoded]:
        """Return the moved weights as they are stored, and forget how far they moved."""
        found = {}
        for name, value in self._centre.items():
            held = self._grid(name)
            found[name] = held.encode(held.indices(value) + self.moves.pop(name), value)
        return found

    def _steps(self) -> "_Steps":
        """Return the allowed steps with the largest gains where the weights are now; the gradient is consumed tensor by tensor."""
        found, offsets = _Steps.none(), self._offsets()

        def take(name: str, gradient: Tensor) -> None:
            nonlocal found
            gain = self._gain(name, gradient).view(-1)
            places = gain.nonzero().view(-1)
            own = _Steps(gain[places].cpu(), places.cpu() + offsets[name]).first(self._largest)
            found = _Steps(torch.cat([found.gains, own.gains]), torch.cat([found.places, own.places])).first(self._largest)

        self._stage.gradients(take)
        return found

    def _offsets(self) -> dict[str, int]:
        """Return the place of every tensor's first weight among all."""
        sizes = [move.numel() for move in self.moves.values()]
        return dict(zip(self.moves, itertools.accumulate(sizes, initial=0), strict=False))

    def _step(self, chosen: "_Steps", sign: int) -> None:
        """Move chosen indices in the direction that the sign of their gain tells, or back."""
        offsets = self._offsets()
        for name, move in self.moves.items():
            places = chosen.places - offsets[name]
            mine = (places >= 0) & (places < move.numel())
            move.view(-1)[places[mine].to(move.device)] += (sign * chosen.gains[mine].sign()).to(move)
        self.show()

    def _gain(self, name: str, gradient: Tensor) -> Tensor:
        """Return the first-order fall of the loss for the allowed step of every index, signed by the index's direction; 0 if barred."""
        base, held = working(self._stage.base[name]), self._grid(name)
        index = held.indices(self._centre[name]) + self.moves[name]
        here = held.value(index)
        best = torch.zeros_like(gradient)
        for direction in (1, -1):
            other = (index + direction).clamp(0, held.top)
            fall = -gradient * (held.value(other) - here)
            allowed = (fall > 0) & (other != index) & ((self.moves[name] + direction).abs() <= 1)
            if self._reach == "corners":
                floor, ceiling = held.corners(base)
                allowed &= (other == floor) | (other == ceiling)
            best = torch.where(allowed, direction * fall, best)
        return best.contiguous()

    def _values(self, name: str, base: Tensor) -> Tensor:
        held = grid(self._centre[name], base)
        return held.value(held.indices(self._centre[name]) + self.moves[name])

    def _grid(self, name: str) -> Grid:
        return grid(self._centre[name], working(self._stage.base[name]))


class _Steps(NamedTuple):
    """Steps of single indices, the largest gain first: what each gains, signed by its direction, and its place among all weights."""

    gains: Tensor
    places: Tensor

    @classmethod
    def none(cls) -> "_Steps":
        """Return no steps."""
        return cls(torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    def first(self, count: int) -> "_Steps":
        """Return the `count` steps that gain the most, or all."""
        best = self.gains.abs().topk(min(count, len(self.gains))).indices
        return _Steps(self.gains[best], self.places[best])
