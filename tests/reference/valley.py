"""The valley as its formula is written, one point at a time: Python floats, rounding by `math.floor`, the gradient by autograd.

L(w) = -a <u, w - c> + (w - c)^T H (w - c) / 2 + kappa |n|^2 / 2 + W(max(0, |A n| - r)), n = N (w - c); in the plane a bent river has
n = (y - b sin(omega x)) / sqrt(1 + b^2 omega^2 cos^2(omega x)), x along u and y along the normal.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

INSIDE = 1e-12


@dataclass
class Slow:
    """The constants of one valley; lists, not arrays."""

    normals: list[list[float]]
    center: list[float]
    r: float
    s: float = 1.0
    wall: str = "linear"
    kappa: float = 0.0
    a: float = 0.0
    u: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    hessian: list[list[float]] = field(default_factory=list)
    bend: tuple[float, float] | None = None
    ell: float = 1.0
    step: float = 1.0
    limit: int | None = None

    def distances(self, w: Tensor) -> list[Tensor]:
        delta = [w[i] - c for i, c in enumerate(self.center)]
        n = [sum(row[i] * delta[i] for i in range(len(delta))) for row in self.normals]
        if self.bend is None:
            return n
        b, omega = self.bend
        x = sum(self.u[i] * delta[i] for i in range(len(delta)))
        return [(n[0] - b * torch.sin(omega * x)) / torch.sqrt(1 + b**2 * omega**2 * torch.cos(omega * x) ** 2)]

    def excess(self, n: list[Tensor]) -> Tensor:
        weights = self.weights or [1.0] * len(n)
        return torch.sqrt(sum((weights[j] * n[j]) ** 2 for j in range(len(n)))) - self.r

    def inside(self, w: list[float]) -> bool:
        return float(self.excess(self.distances(torch.tensor(w, dtype=torch.float64)))) <= INSIDE

    def loss(self, w: Tensor) -> Tensor:
        delta, n = [w[i] - c for i, c in enumerate(self.center)], self.distances(w)
        total = self.kappa / 2 * sum(part**2 for part in n)
        for i, row in enumerate(self.hessian):
            for j, entry in enumerate(row):
                total = total + entry * delta[i] * delta[j] / 2
        if self.a:
            total = total - self.a * sum(self.u[i] * delta[i] for i in range(len(delta)))
        if self.inside(w.tolist()):
            return total
        e = self.excess(n)
        heights = {"linear": self.s * e, "quadratic": self.s * e**2 / 2, "saturating": self.s * self.ell * (1 - torch.exp(-e / self.ell))}
        return total + heights[self.wall]

    def value(self, w: list[float]) -> float:
        return float(self.loss(torch.tensor(w, dtype=torch.float64)))

    def gradient(self, w: list[float]) -> list[float]:
        point = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        loss = self.loss(point) + 0 * point.sum()  # a graph even where the loss is constant
        return torch.autograd.grad(loss, point)[0].tolist()

    def rounded(self, w: list[float]) -> list[float]:
        codes = [math.floor(x / self.step + 0.5) for x in w]
        if self.limit is not None:
            codes = [max(-self.limit, min(self.limit, code)) for code in codes]
        return [code * self.step for code in codes]

    def ste(self, w: list[float], lr: float, steps: int) -> list[list[float]]:
        """Return the deployed points q_0 ... q_steps."""
        deployed = []
        for _ in range(steps + 1):
            q = self.rounded(w)
            deployed.append(q)
            g = self.gradient(q)
            w = [w[i] - lr * g[i] for i in range(len(w))]
        return deployed
