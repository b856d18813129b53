"""LOTION's relatives the slow way, in the papers' notation; only a grid's sorted values and its scales come from stepwell."""

from itertools import pairwise

import torch
from scipy.special import ndtr
from torch import Tensor, nn


def levels(quantizer, scale: float) -> Tensor:
    """Return Q, the sorted grid values of one block in weight units; a negative scale turns them over."""
    return torch.tensor(sorted(value * scale for value in quantizer.format.values), dtype=torch.float64)


def parq(w: float, grid: Tensor, rho: float) -> float:
    """Return PARQ's proximal map: clip(m + (w - m) / rho, lower, upper) around the middle m of the weight's cell."""
    if not grid[0] < w < grid[-1]:
        return float(grid[0] if w <= grid[0] else grid[-1])
    for lower, upper in pairwise(grid.tolist()):
        if lower <= w <= upper:
            middle = (lower + upper) / 2
            if rho == 0:
                return lower if w < middle else upper
            return min(max(middle + (w - middle) / rho, lower), upper)
    raise AssertionError("a weight between two neighbours")


def prox(w: float, g: float, grid: Tensor, strength: float, eta: float) -> float:
    """Return argmin (u - w)^2 / (2 eta) + strength / 2 g (u - lower)(upper - u) over the weight's cell: 401 trials, then bisection.

    The bisection compares costs on either side, which are exact differences of a parabola; costs themselves tell minima apart to 1e-8 only.
    """
    w = min(max(w, float(grid[0])), float(grid[-1]))
    lower, upper = next((a, b) for a, b in pairwise(grid.tolist()) if a <= w <= b)

    def cost(u):
        return (u - w) ** 2 / (2 * eta) + strength / 2 * g * (u - lower) * (upper - u)

    trials = torch.linspace(lower, upper, 401, dtype=torch.float64)
    best, step = float(trials[cost(trials).argmin()]), (upper - lower) / 400
    if best in (lower, upper) and cost(best) <= cost(best + step if best == lower else best - step):
        left, right = (lower, lower + step) if best == lower else (upper - step, upper)
    else:
        left, right = best - step, best + step
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (left, middle) if cost(middle + step) > cost(middle - step) else (middle, right)
    return min(max((left + right) / 2, lower), upper)


def soft(v: float, grid: Tensor, temperature: float) -> float:
    """Return psi_T(v) = l_0 + sum_k (l_k - l_{k-1}) Phi((v - theta_k) / T) with the thresholds in the middle."""
    return float(grid[0]) + sum((b - a) * ndtr((v - (a + b) / 2) / temperature) for a, b in pairwise(grid.tolist()))


class Fake(nn.Module):
    """A Linear layer that rounds its weight inside the forward pass as LSQ does; scale = sign * exp(theta), one per block of inputs."""

    def __init__(self, weight: Tensor, scale: Tensor, block: int, low: float, high: float):
        super().__init__()
        self.weight, self.theta = nn.Parameter(weight.clone()), nn.Parameter(scale.abs().log())
        self.sign, self.block, self.low, self.high = scale.sign(), block, low, high

    def forward(self, x: Tensor) -> Tensor:
        """Return x q(W)^T; rounding has slope one, the clamp its own."""
        scale = self.sign * self.theta.exp()
        clamped = (self.weight.reshape(-1, self.block) / scale).clamp(self.low, self.high)
        rounded = clamped + (clamped.round() - clamped).detach()
        return x @ (rounded * scale).reshape(self.weight.shape).T


class Carried(Fake):
    """The same layer where codes stay when a scale moves: the caller multiplies each block's weight by what its scale was multiplied by."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x q(W)^T; the scale sees its codes, the weight a slope of one inside the grid."""
        scale = self.sign * self.theta.exp()
        blocks = self.weight.reshape(-1, self.block)
        units = (blocks / scale).detach()
        inside = (units == units.clamp(self.low, self.high)).to(blocks)
        rounded = units.clamp(self.low, self.high).round() * scale + (blocks - blocks.detach()) * inside
        return x @ rounded.reshape(self.weight.shape).T
