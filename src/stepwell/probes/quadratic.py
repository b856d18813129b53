"""Quadratic: what the local second-order model of the loss says about a displacement, against what the loss does (D3).

Symbols: v = displacement, g = gradient, H = Hessian, both at the model's weights; predicted = g.v + v.Hv / 2, actual = L(w + v) - L(w);
s(t) = v . grad L(w + t v), whose derivative at 0 is v.Hv. A Hessian method sees no more than `predicted`; below `actual`, it underestimates
what crossing the wall costs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepwell.probes.points import Move, Weights, dot, length, place, weight, working
from stepwell.probes.points import toward as displacement
from stepwell.probes.stage import Cost, Loss, Stage, staged
from stepwell.quantizers import Quantizer

STEP = 1e-2  # of the weights' length, to both sides


@dataclass(frozen=True)
class Quadratic:
    """First and second derivative along a displacement, and the true change; exact for the given data.

    Attributes:
        slope: g.v.
        curvature: v.Hv.
        predicted: g.v + v.Hv / 2.
        actual: growth of the loss from the model's own weights to the end of the displacement.
        start: loss at the model's own weights.
        cost: passes over the data.
    """

    slope: float
    curvature: float
    predicted: float
    actual: float
    start: float
    cost: Cost

    @property
    def ratio(self) -> float:
        """Predicted over actual growth: below 1 the quadratic underestimates; NaN where the loss does not change."""
        return self.predicted / self.actual if self.actual else math.nan


def quadratic(model: nn.Module, loss: Loss, *, toward: Weights | Quantizer) -> Quadratic:
    """Return the second-order prediction for moving the weights to a point, and what the loss really does.

    The curvature is a central difference of the slope s(t) over a hundredth of the weights' length to both sides, so that no second
    derivative has to exist: fused attention works. Kinks (ReLU, max pooling) within that step count as the curvature they are on average;
    with a tenth of the step too few of them lie in it, and on small networks the sign may be chance. `exact_quadratic` leaves them out.
    Holds no more than the copy of the weights: gradients are reduced tensor by tensor.

    Args:
        model: any module; left exactly as found.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        toward: weights by name, encoded or plain; a Quantizer stands for the model's weights rounded to nearest.

    Returns:
        The derivatives and the growth; six forward and three backward passes.

    Raises:
        TypeError, ValueError: as `segment`, and a loss without a graph.

    >>> import torch
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0]])
    >>> found = quadratic(layer, lambda m: m.weight.pow(3).sum(), toward={"weight": torch.tensor([[2.0]])})
    >>> found.slope, round(found.curvature, 3), found.actual  # of x^3 from 1 to 2
    (3.0, 6.0, 7.0)
    """
    target = place(model, toward, "toward")
    with staged(model, loss, target) as stage:
        slope, curvature = _derivatives(stage, displacement(target))
        stage.put(lambda name, base: weight(target[name], base))
        actual = stage.loss() - stage.start
        return Quadratic(slope, curvature, slope + curvature / 2, actual, stage.start, stage.cost)


def exact_quadratic(model: nn.Module, loss: Loss, *, toward: Weights | Quantizer) -> Quadratic:
    """Return what `quadratic` returns, with the derivative of the gradient in place of a difference.

    At kinks it is the curvature of the piece that the weights are on, which no finite step gives. The price is memory: the displacement and
    the gradient, two copies of the weights besides the one that restores them, and a graph of the gradient, two to three times the graph of
    the loss. Attention runs on its plain kernel, whose operations can be differentiated twice.

    Args:
        model, loss, toward: as `quadratic`; every operation must have a second derivative.

    Returns:
        The derivatives and the growth; four forward and two backward passes: a product with the Hessian counts as one beside the gradient.

    Raises:
        TypeError, ValueError: as `quadratic`.
        RuntimeError: an operation without a second derivative.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0]])
    >>> exact_quadratic(layer, lambda m: m.weight.pow(3).sum(), toward={"weight": torch.tensor([[2.0]])}).curvature
    6.0
    """
    target = place(model, toward, "toward")
    with staged(model, loss, target) as stage:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            slope, curvature = stage.product(displacement(target))
        stage.put(lambda name, base: weight(target[name], base))
        actual = stage.loss() - stage.start
        return Quadratic(slope, curvature, slope + curvature / 2, actual, stage.start, stage.cost)


def _derivatives(stage: Stage, move: Move) -> tuple[float, float]:
    """Return g.v and v.Hv at the model's weights."""
    size, way = length(lambda name, base: base, stage.base), length(move, stage.base)
    slope = _slope(stage, move)
    if not way:
        return slope, 0.0
    step = STEP * (size or way) / way
    ends = []
    for t in (-step, step):
        stage.put(lambda name, base, t=t: torch.add(base, move(name, base), alpha=t))  # type: ignore[misc]
        ends.append(_slope(stage, move))
    return slope, (ends[1] - ends[0]) / (2 * step)


def _slope(stage: Stage, move: Move) -> float:
    """Return the derivative of the loss along a displacement where the weights are now."""
    parts: list[float] = []

    def take(name: str, gradient: Tensor) -> None:
        parts.append(dot(gradient, move(name, working(stage.base[name]))))

    stage.gradients(take)
    return math.fsum(parts)
