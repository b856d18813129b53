"""Grid-to-basin ratios: how far rounding moves the weights, in widths of the set where the loss is within tolerance (D2).

A ratio above 1 says that rounding leaves that set. Along the rounding error itself that is true by definition (`rho_self`: a margin, no
prediction); the others measure the width elsewhere. Symbols: w = weights, q = rounded weights, s = distance of grid neighbours,
r(v) = width along v in lengths of v.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stepwell.probes.directions import alone, axes, gaussian_noise, keys, uniform_noise
from stepwell.probes.points import Move, Place, Weights, length, matching, place, rounding_distance
from stepwell.probes.points import toward as displacement
from stepwell.probes.stage import Cost, Loss, check_tolerance, staged
from stepwell.probes.width import Width, along
from stepwell.ptq.chosen import chosen
from stepwell.quantizers import Encoded, Quantizer


@dataclass(frozen=True)
class Ratio:
    """A grid-to-basin ratio.

    Attributes:
        name: which one.
        value: the ratio; above 1 it says that rounding to nearest leaves the tolerance.
        stderr: standard error over the draws of a random direction; NaN for one draw, 0 where nothing is drawn.
        widths: what was measured.
        tautology: whether the ratio only repeats that the rounded weights are outside: a margin, not a prediction.
        cost: passes over the data; 0 where a width was given.
    """

    name: str
    value: float
    stderr: float
    widths: tuple[Width, ...]
    tautology: bool
    cost: Cost

    def __str__(self) -> str:
        label = " (tautology: above 1 exactly where rounding fails; a margin, no prediction)" if self.tautology else ""
        error = f" +- {self.stderr:.2g}" if self.stderr > 0 else ""
        return f"{self.name} = {self.value:.3g}{error}{label}"


@dataclass(frozen=True)
class LayerRatios:
    """The ratio of every tensor alone, along its own rounding error, and their quadratic sum.

    Attributes:
        layers: name -> ratio: which tensors carry the damage.
        value: root of the sum of squares, exact only where the loss is a block-diagonal quadratic.
        cost: passes over the data.
    """

    layers: dict[str, Ratio]
    value: float
    cost: Cost


def rho_self(model: nn.Module, loss: Loss, *, toward: Weights | Quantizer, tolerance: float = 0.1) -> Ratio:
    """Return 1 / r(q - w): a tautology, above 1 exactly where rounding fails on a monotone line; use it as a margin.

    Args:
        model: any module; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        toward: the rounded weights by name; a Quantizer rounds the model's to nearest.
        tolerance: growth of the loss that still counts as inside, above 0.

    Raises:
        TypeError, ValueError: as `width`.
    """
    return _measured("rho_self", model, loss, toward, tolerance, lambda target: [displacement(target)], tautology=True)


def rho_uniform(
    model: nn.Module, loss: Loss, *, toward: Weights | Quantizer, tolerance: float = 0.1, draws: int = 3, seed: int = 0
) -> Ratio:
    """Return the mean of 1 / r(xi), xi uniform within half a grid step of every weight: how large rounding noise is, not which it is.

    Where a weight lies beyond the grid's range, xi is its clipping error. Three draws take some 70 forward passes per grid, and as many
    again for the next grid: `rho_fn`, whose one width serves all grids, is the cheap one.

    Args:
        model, loss, toward, tolerance: as `rho_self`; `toward` must be encoded, because its grid gives the steps.
        draws: random directions, each 10 to 29 forward passes.
        seed: of the draws.

    Raises:
        TypeError, ValueError: as `width`; plain tensors in `toward`, `draws` below 1.
    """
    _check_draws(draws)

    def noise(target: Place) -> list[Move]:
        for name, value in target.items():
            if not isinstance(value, Encoded):
                raise TypeError(f"`toward` must be encoded: got {type(value).__name__} for {name!r}, which has no step.")
        return [uniform_noise(target, key) for key in keys(seed, draws)]

    return _measured("rho_uniform", model, loss, toward, tolerance, noise)


def rho_fn(
    model: nn.Module,
    loss: Loss,
    *,
    toward: Weights | Quantizer,
    tolerance: float = 0.1,
    draws: int = 1,
    seed: int = 0,
    width: Width | None = None,
) -> Ratio:
    """Return |q - w| / (r(g) |g|), g Gaussian with every output row scaled to the norm of the weight's row (filter normalised).

    One width serves every grid: give `widths[0]` of an earlier ratio, and nothing is measured. Differs from `rho_uniform` under rescaling
    of layers, which leaves the function as it is and changes this number.

    Args:
        model, loss, toward, tolerance: as `rho_self`.
        draws: random directions, each 10 to 29 forward passes.
        seed: of the draws.
        width: of an earlier call on the same weights and loss.

    Raises:
        TypeError, ValueError: as `width`; `draws` below 1; a given width of another tolerance.
    """
    _check_draws(draws)
    return _by_distance(
        "rho_fn", model, loss, toward, tolerance, width, lambda moved: [gaussian_noise(moved, key) for key in keys(seed, draws)]
    )


def rho_cross(
    model: nn.Module,
    loss: Loss,
    *,
    toward: Weights | Quantizer,
    coarse: Weights | Quantizer,
    tolerance: float = 0.1,
    width: Width | None = None,
) -> Ratio:
    """Return |q - w| / (r(d) |d|), d the rounding error on a coarser grid of the same scheme, usually 3 bits.

    Args:
        model, loss, toward, tolerance: as `rho_self`.
        coarse: the rounded weights that the width is measured towards; the same names.
        width: of an earlier call with the same `coarse`.

    Raises:
        TypeError, ValueError: as `width`; a name missing in `coarse`; a given width of another tolerance.
    """

    def direction(moved: Axes) -> list[Move]:
        return [displacement(matching(model, coarse, "coarse", moved))]

    return _by_distance("rho_cross", model, loss, toward, tolerance, width, direction)


def rho_layers(model: nn.Module, loss: Loss, *, toward: Weights | Quantizer, tolerance: float = 0.1) -> LayerRatios:
    """Return the ratio of each tensor's own rounding error with the others left in float; 10 to 29 forward passes per tensor.

    Args:
        model, loss, toward, tolerance: as `rho_self`.

    Raises:
        TypeError, ValueError: as `width`.
    """
    check_tolerance(tolerance)
    target, layers = place(model, toward, "toward"), {}
    with staged(model, loss, target) as stage:
        for name in target:
            found = along(stage, alone(name, target), tolerance)
            layers[name] = Ratio(f"rho of {name}", found.ratio, 0.0, (found,), True, found.cost)
        return LayerRatios(layers, math.hypot(*(ratio.value for ratio in layers.values())), stage.cost)


Directions = Callable[[Place], list[Move]]
Axes = Mapping[str, int | None]  # the weights that are moved, and their contraction dimensions


def _measured(
    name: str,
    model: nn.Module,
    loss: Loss,
    given: Weights | Quantizer,
    tolerance: float,
    directions: Directions,
    *,
    tautology: bool = False,
) -> Ratio:
    """Return the mean of 1 / r over directions."""
    check_tolerance(tolerance)
    target = place(model, given, "toward")
    moves = directions(target)
    with staged(model, loss, target) as stage:
        widths = tuple(along(stage, move, tolerance) for move in moves)
        return Ratio(name, *_mean([one.ratio for one in widths]), widths, tautology, stage.cost)


def _by_distance(
    name: str,
    model: nn.Module,
    loss: Loss,
    given: Weights | Quantizer,
    tolerance: float,
    width: Width | None,
    directions: Callable[[Axes], list[Move]],
) -> Ratio:
    """Return the rounding distance in radii that are measured, or given."""
    check_tolerance(tolerance)
    if width is not None and width.tolerance != tolerance:
        raise ValueError(f"`width` was measured for tolerance {width.tolerance:g}: got tolerance={tolerance:g}. Measure it again.")
    distance, moved = _distance(model, given)
    moves = directions(moved)
    if width is not None:
        return Ratio(name, distance / width.radius, 0.0, (width,), False, Cost(0))
    with staged(model, loss, moved) as stage:
        widths = tuple(along(stage, move, tolerance) for move in moves)
        return Ratio(name, *_mean([distance / one.radius for one in widths]), widths, False, stage.cost)


def _distance(model: nn.Module, given: Weights | Quantizer) -> tuple[float, dict[str, int | None]]:
    """Return how far the rounded weights are, and which they are; a quantizer's are never held together."""
    if isinstance(given, Quantizer):
        rows = chosen(model, given)
        return rounding_distance(rows), {row.name: row.quantizer.axis for row in rows}
    target = place(model, given, "toward")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return length(displacement(target), {key: parameters[key] for key in target}), axes(target)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _check_draws(draws: int) -> None:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"`draws` must be a whole number of random directions, 1 or more: got {draws!r}.")
