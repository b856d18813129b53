"""Plane: the loss over the plane through three points, once with the weights as they are and once rounded to the grid (D6).

Symbols: w = the model's weights, q = the first point (rounded weights), t = the second (trained ones); e1 along q - w, e2 the part of t - w
across it. The rounded panel is constant on few cells, and latent weights behind t are not in the plane.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from stepwell.probes.grid import grid
from stepwell.probes.neighbours import encoded_place
from stepwell.probes.points import Place, Weights, dot, matching, place, weight, working
from stepwell.probes.stage import Cost, Loss, Stage, check_tolerance, staged
from stepwell.quantizers import Encoded, Quantizer

SIZE = 17


@dataclass(frozen=True)
class Plane:
    """Losses on a square of points; exact for the given data.

    Attributes:
        positions: of rows and columns alike, from -0.5 to 1.5; 1 is the length of e1 or e2.
        losses: `losses[i][j]` at e2-position i and e1-position j.
        rounded: the same with the weights rounded to the grid there.
        cosine: of the angle between q - w and t - w.
        lengths: of q - w, and of the part of t - w across it, in weight units.
        mark: e1-position of t; its e2-position is 1. w is at (0, 0), q at (1, 0).
        area, rounded_area: share of the points with a loss within tolerance of `start`.
        start: loss at the model's own weights.
        cost: passes over the data.
    """

    positions: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    rounded: tuple[tuple[float, ...], ...]
    cosine: float
    lengths: tuple[float, float]
    mark: float
    area: float
    rounded_area: float
    start: float
    cost: Cost


def plane(model: nn.Module, loss: Loss, *, toward: Weights | Quantizer, across: Weights, tolerance: float = 0.1, size: int = SIZE) -> Plane:
    """Return the loss over the plane through the model's weights and two points.

    Args:
        model: holds w; left exactly as found, BatchNorm statistics frozen throughout.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        toward: q, encoded, by name: its grid is the one that the second panel rounds to; a Quantizer rounds the model's to nearest.
        across: t, by name, for instance the weights after training.
        tolerance: growth of the loss that still counts as inside, above 0.
        size: points along each side, 2 or more.

    Returns:
        Two panels; 2 size^2 + 2 forward passes.

    Raises:
        TypeError, ValueError: as `segment`, plain tensors in `toward`, three points on one line, a size below 2.
    """
    check_tolerance(tolerance)
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"`size` must be a whole number of points along each side, 2 or more: got {size!r}.")
    first = encoded_place(place(model, toward, "toward"), "toward")
    second = matching(model, across, "across", dict(first))
    positions = tuple(-0.5 + 2 * k / (size - 1) for k in range(size))
    with staged(model, loss, first) as stage:
        near, far, both = _products(stage, first, second)
        rest = far - both * both / near if near else 0.0
        if not rest > 1e-12 * far:
            raise ValueError(
                f"`toward` and `across` must span a plane with the model's weights: got squared lengths {near:g} and {rest:g}."
            )
        shift = both / near
        panels = _panels(stage, first, second, shift, positions)
        areas = [sum(value <= stage.start + tolerance for row in panel for value in row) / size**2 for panel in panels]
        return Plane(
            positions=positions,
            losses=panels[0],
            rounded=panels[1],
            cosine=both / math.sqrt(near * far),
            lengths=(math.sqrt(near), math.sqrt(rest)),
            mark=shift,
            area=areas[0],
            rounded_area=areas[1],
            start=stage.start,
            cost=stage.cost,
        )


Panel = tuple[tuple[float, ...], ...]


def _panels(stage: Stage, first: dict[str, Encoded], second: Place, shift: float, positions: tuple[float, ...]) -> tuple[Panel, Panel]:
    """Return the losses over the plane, plain and rounded."""

    def at(name: str, base: Tensor, x: float, y: float) -> Tensor:
        one, two = _ways(first[name], second[name], base)
        return base + (x - y * shift) * one + y * two

    def row(y: float, rounded: bool) -> tuple[float, ...]:
        losses = []
        for x in positions:
            stage.put(lambda name, base, x=x: grid(first[name], base).round(at(name, base, x, y)) if rounded else at(name, base, x, y))  # type: ignore[misc]
            losses.append(stage.loss())
        return tuple(losses)

    return tuple(row(y, False) for y in positions), tuple(row(y, True) for y in positions)


def _products(stage: Stage, first: dict[str, Encoded], second: Place) -> tuple[float, float, float]:
    """Return the squared lengths of the ways to both points, and their scalar product."""
    near = far = both = 0.0
    for name, base in stage.base.items():
        one, two = _ways(first[name], second[name], working(base))
        near, far, both = near + dot(one, one), far + dot(two, two), both + dot(one, two)
    return near, far, both


def _ways(one: Encoded, two: Encoded | Tensor | None, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ways from the model's weight to both points."""
    return weight(one, base) - base, weight(two, base) - base
