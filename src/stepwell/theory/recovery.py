"""Recovery: what straight-through training did in a valley, and what two theorems say that it must do.

Iteration: q_k = Q(w_k), w_{k+1} = w_k - eta grad L(q_k); n(w) = N (w - c) are the normal coordinates, the basin is |A n| <= r.
R1, distance: the latent point comes closer to the river at every step with q outside. If <grad_n L(q), n(q)> >= gain + G E there,
    |grad_n L(q)| <= G, gain > 0 and 0 < eta < 2 gain / G^2, then the first entry is at most
    ceil((|n(w_0)|^2 - (r - E)_+^2) / (2 eta gain - eta^2 G^2)). For a linear wall of slope s, gain = s r - G E and G = s.
R2, staircase, for one normal nu: the latent point moves along nu, *away* from the river, to offset its rounding. n(Q(w_0 + alpha nu))
    is a non-decreasing staircase, at most E away from n(w_0) + alpha, so the near edge is passed at step
    ceil((E - r - n(w_0)) / (eta s)) at the latest; the basin is entered there if no stretch of length eta G lifts it by more than 2 r.
Source: the paper (arXiv:2606.09012) claims a finite-time theorem like R1; both are derived here, neither is copied from it.
Symbols: E = `rounding`, the largest |N (Q(w) - w)|; s and G = the smallest and the largest slope that the run can meet.
"""

from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import NamedTuple

import numpy as np

from stepwell.theory.staircase import Array
from stepwell.theory.walls import Wall

EXACT_DIMENSIONS = 14  # up to here the largest rounding error is taken over all corners of the cell


class Bounds(NamedTuple):
    """What the theorems say about one run; None where the conditions of one do not hold.

    Attributes:
        distance: R1's bound on the first entry.
        staircase: R2's bound on the step at which the near edge is passed.
        jump: R2's longest move across the basin in one step, in weight units.
        width: the width of the basin, 2 r, that the jump must not exceed for R2 to prove entry.
    """

    distance: int | None = None
    staircase: int | None = None
    jump: float = inf
    width: float = 0.0


@dataclass(frozen=True, eq=False)
class Recovery:
    """One run of straight-through training.

    Attributes:
        points: deployed points q_k, `(steps + 1, d)`; row k is the one whose gradient step k takes.
        latent: latent points w_k, `(steps + 1, d)`.
        inside: whether each deployed point lies in the basin, `(steps + 1,)`.
        bounds: what the theorems say, each by itself.
    """

    points: Array
    latent: Array
    inside: Array
    bounds: Bounds

    @property
    def first_entry(self) -> int | None:
        """The first k with a deployed point in the basin; None is never."""
        return int(self.inside.argmax()) if self.inside.any() else None

    @property
    def guaranteed(self) -> bool:
        """Whether a theorem proves entry, at `bound` at the latest."""
        return self.bounds.distance is not None or (self.bounds.staircase is not None and self.bounds.jump <= self.bounds.width)

    @property
    def bound(self) -> int | None:
        """The smallest proven bound on first entry; without a proof, R2's on passing the near edge; None where neither theorem holds."""
        distance, staircase, jump, width = self.bounds
        if distance is None or staircase is None:
            return staircase if distance is None else distance
        return min(distance, staircase) if jump <= width else distance

    @property
    def stay(self) -> float | None:
        """The share of the steps after first entry spent in the basin; None if it is never entered or only at the end."""
        first = self.first_entry
        return None if first is None or first + 1 == len(self.inside) else float(self.inside[first + 1 :].mean())


class Descent(NamedTuple):
    """The numbers that the theorems need of a straight valley whose gradient has normal components only.

    Attributes:
        normals: orthonormal rows N, `(k, d)`.
        anisotropy: the diagonal of A, `(k,)`.
        half_width: r.
        wall: the wall outside.
        curvature: kappa, of the quadratic in the normal coordinates.
        step: distance between lattice points.
        lr: eta.
    """

    normals: Array
    anisotropy: Array
    half_width: float
    wall: Wall
    curvature: float
    step: float
    lr: float


def bounds(descent: Descent, start: Array, latent: Array, deployed: Array) -> Bounds:
    """Return what both theorems say about a run whose first deployed point is outside the basin.

    Args:
        descent: the valley and the step size.
        start: the first latent point, `(d,)`.
        latent, deployed: normal coordinates of the first latent and deployed point, `(k,)`.
    """
    rounding = largest_rounding(descent.normals, descent.step)
    distance = _distance(descent, rounding, float(np.linalg.norm(latent)))
    if len(descent.normals) > 1:
        return Bounds(distance)
    # mirrored where the first point lies above the basin
    sign = -1.0 if deployed[0] > 0 else 1.0
    staircase, stride = _staircase(descent, rounding, sign * latent[0], abs(deployed[0]))
    radius = float(descent.half_width / descent.anisotropy[0])
    span = max(rounding - radius - sign * latent[0], 0.0) + stride
    return Bounds(distance, staircase, jump(sign * descent.normals[0], start, descent.step, stride=stride, span=span), 2 * radius)


def largest_rounding(normals: Array, step: float) -> float:
    """Return E = sup |N e| over errors of at most half a step per coordinate; an upper bound for many normals in many dimensions."""
    count, dim = normals.shape
    if count == 1:
        return float(step / 2 * np.abs(normals).sum())
    if dim <= EXACT_DIMENSIONS:  # a convex function is largest at a corner
        signs = 2.0 * (np.arange(1 << (dim - 1))[:, None] >> np.arange(dim) & 1) - 1
        return float(step / 2 * np.linalg.norm(signs @ normals.T, axis=1).max())
    return float(step / 2 * min(sqrt(dim), float(np.linalg.norm(np.abs(normals).sum(1)))))


def jump(normal: Array, start: Array, step: float, *, stride: float, span: float) -> float:
    """Return how far the staircase n(Q(start + alpha normal)) rises at most over a stretch of length `stride` begun in [0, span]."""
    moving = np.flatnonzero(normal)
    rates, places = np.abs(normal[moving]) / step, start[moving] / step * np.sign(normal[moving])
    first = np.floor(places - 0.5)  # flips lie at half-odd places; one below zero is dropped again further down
    counts = np.ceil((span + stride) * rates).astype(int) + 2
    coordinate = np.repeat(np.arange(len(moving)), counts)
    index = np.arange(len(coordinate)) - np.repeat(np.cumsum(counts) - counts, counts)
    flips = (first[coordinate] + 0.5 + index - places[coordinate]) / rates[coordinate]
    order = np.argsort(flips, kind="stable")
    flips, sizes = flips[order], (rates * step**2)[coordinate[order]]
    kept = flips >= -1e-9 * step
    flips, total = flips[kept], np.concatenate([[0.0], np.cumsum(sizes[kept])])
    # a closed stretch, widened by float error: flips that are exactly one stride apart count together
    ends = np.searchsorted(flips, flips + stride * (1 + 1e-9), side="right")
    rises = (total[ends] - total[:-1])[flips <= span]
    return float(rises.max(initial=0.0))


def _distance(descent: Descent, rounding: float, start: float) -> int | None:
    """Return R1's bound, with slopes taken over all that the run can reach: |n(q)| <= |n(w_0)| + E."""
    widest, r = float(descent.anisotropy.max()), descent.half_width
    reach = start + rounding
    low, high = descent.wall.range(widest * reach - r)
    steepest = high * widest + descent.curvature * reach
    gain = low * r + descent.curvature * (r / widest) ** 2 - steepest * rounding
    if gain <= 0 or descent.lr >= 2 * gain / steepest**2:
        return None
    progress = 2 * descent.lr * gain - (descent.lr * steepest) ** 2
    return ceil((start**2 - max(r / widest - rounding, 0.0) ** 2) / progress)


def _staircase(descent: Descent, rounding: float, latent: float, deployed: float) -> tuple[int | None, float]:
    """Return R2's bound and the longest step along the normal; |n(q)| only falls until the edge is passed, which bounds the slopes."""
    scale = float(descent.anisotropy[0])
    radius = descent.half_width / scale
    low, high = descent.wall.range(scale * deployed - descent.half_width)
    slowest = low * scale + descent.curvature * radius
    stride = descent.lr * (high * scale + descent.curvature * deployed)
    return (ceil((rounding - radius - latent) / (descent.lr * slowest)) if slowest > 0 else None), stride
