"""Quadratic: what the local second-order model of the loss says about a displacement, against what the loss does (D3).

Symbols: v = displacement, g = gradient, H = Hessian, both at the model's weights; predicted = g.v + v.Hv / 2, actual = L(w + v) - L(w).
A Hessian method sees no more than `predicted`; below `actual`, it underestimates what crossing the wall costs.
"""

import math
from dataclasses import dataclass

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepwell.probes.points import Move, Weights, dot, place, weight, working
from stepwell.probes.points import toward as displacement
from stepwell.probes.stage import Cost, Loss, Stage, staged
from stepwell.quantizers import Quantizer


@dataclass(frozen=True)
class Quadratic:
    """First and second derivative along a displacement, and the true change; exact for the given data.

    Attributes:
        slope: g.v.
        curvature: v.Hv.
        predicted: g.v + v.Hv / 2.
        actual: growth of the loss from the model's own weights to the end of the displacement.
        start: loss at the model's own weights.
        cost: passes over the data; a Hessian-vector product counts as one backward pass beside the gradient's.
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

    The Hessian-vector product is a derivative of the gradient (no finite differences). At kinks (ReLU) it is the curvature of the piece
    that the weights are on. Holds the displacement and a graph of the gradient besides the copy of the weights.

    Args:
        model: any module whose operations can be differentiated twice; left exactly as found. Attention runs on its plain kernel.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        toward: weights by name, encoded or plain; a Quantizer stands for the model's weights rounded to nearest.

    Returns:
        The derivatives and the growth; four forward and two backward passes.

    Raises:
        TypeError, ValueError: as `segment`, and a loss without a graph.

    >>> import torch
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0]])
    >>> found = quadratic(layer, lambda m: m.weight.pow(3).sum(), toward={"weight": torch.tensor([[2.0]])})
    >>> found.slope, found.curvature, found.predicted, found.actual  # of x^3 from 1 to 2
    (3.0, 6.0, 6.0, 7.0)
    """
    target = place(model, toward, "toward")
    with staged(model, loss, target) as stage:
        slope, curvature = _derivatives(stage, displacement(target))
        stage.put(lambda name, base: weight(target[name], base))
        actual = stage.loss() - stage.start
        return Quadratic(slope, curvature, slope + curvature / 2, actual, stage.start, stage.cost)


def _derivatives(stage: Stage, move: Move) -> tuple[float, float]:
    """Return g.v and v.Hv at the model's weights."""
    with sdpa_kernel(SDPBackend.MATH), stage.graph() as (value, weights):  # fused attention has no second derivative
        parts = stage.differentiate(value, again=True)
        ways = [move(name, working(stage.base[name])) for name in weights]
        along = value.new_zeros(()).double()
        for part, way in zip(parts, ways, strict=True):
            if part is not None:
                along = along + (part * way.to(part)).sum()
        if not along.requires_grad:  # a loss that is linear in the weights
            return float(along), 0.0
        seconds = stage.differentiate(along)
        curvature = sum(dot(second, way.to(second)) for second, way in zip(seconds, ways, strict=True) if second is not None)
        return float(along.detach()), float(curvature)
