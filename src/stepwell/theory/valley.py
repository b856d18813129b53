"""Valley: a flat-floored valley around a river, and what rounding and straight-through training do in it.

Loss: L(w) = -a <u, w - c> + (w - c)^T H (w - c) / 2 + kappa |n|^2 / 2 + W(max(0, |A n| - r)), with n = N (w - c) the signed normal
coordinates. The basin is |A n| <= r; the river is n = 0. A curved river in the plane has
n = (y - b sin(omega x)) / sqrt(1 + b^2 omega^2 cos^2(omega x)), with x and y the coordinates of w - c along u and along the normal.
Source: Li et al. (arXiv:2606.09012) for the picture of a river in a valley; the model is ours.
Symbols: N = normals, c = center, r = half_width, s = slope, W = wall, kappa = curvature, a = river_slope, A = anisotropy, H = hessian,
u = river, (b, omega) = bend, Delta = step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepwell.theory.frame import Frame, frame
from stepwell.theory.lattice import Lattice, check_hessian, closest, combinations
from stepwell.theory.recovery import Bounds, Descent, Recovery, bounds
from stepwell.theory.staircase import Array
from stepwell.theory.walls import SHAPES, Shape, Wall

EDGE = 1e-12  # a point this far outside counts as inside
MAX_RECORD = 100_000_000  # numbers that a run may keep


@dataclass(frozen=True, eq=False)
class Valley:
    """A river in a valley over the lattice `step * Z^d`, rounded half up.

    Attributes:
        normals: orthonormal rows, `(k, d)` or `(d,)`: the directions across the valley.
        center: a point of the river, `(d,)`.
        half_width: r > 0, of the flat floor, in weight units.
        slope: s > 0, of the wall.
        wall: "linear", "quadratic" or "saturating".
        curvature: kappa >= 0, across the river, inside and outside the basin.
        river_slope: a, how fast the loss falls along `river`.
        anisotropy: weights A > 0 of the normal coordinates in the basin's shape, `(k,)`; None is all ones.
        hessian: H, positive definite `(d, d)`, one more quadratic around the center; None is none.
        river: the direction u of `river_slope`, orthogonal to the normals, `(d,)`; None is the coordinate axis closest to the river,
            projected onto it.
        bend: `(amplitude, frequency)` of a curved river, for one normal in two dimensions; None is straight.
        saturation: ell > 0, the length over which a saturating wall levels off.
        step: Delta > 0, the distance between lattice points.
        limit: the highest code of a clipped lattice; None is unbounded.

    >>> v = Valley(normals=[0.6, 0.8], center=[0.4, 0.3], half_width=0.3)
    >>> v.rtn([0.4, 0.3]), round(v.loss(v.rtn([0.4, 0.3])), 6), v.ste([0.4, 0.3], lr=0.05, steps=100).first_entry
    (array([0., 0.]), 0.18, 4)
    """

    normals: ArrayLike
    center: ArrayLike
    half_width: float
    slope: float = 1.0
    wall: Shape = "linear"
    curvature: float = 0.0
    river_slope: float = 0.0
    anisotropy: ArrayLike | None = None
    hessian: ArrayLike | None = None
    river: ArrayLike | None = None
    bend: tuple[float, float] | None = None
    saturation: float = 1.0
    step: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("half_width", "slope", "saturation", "step"):
            _check_number(name, getattr(self, name), above=0.0)
        _check_number("curvature", self.curvature, least=0.0)
        _check_number("river_slope", self.river_slope)
        if self.wall not in SHAPES:
            raise ValueError(f"`wall` must be one of {', '.join(map(repr, SHAPES))}: got {self.wall!r}.")
        if self.limit is not None and (isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1):
            raise ValueError(f"`limit` must be a positive integer or None: got {self.limit!r}.")
        _ = self._frame, self._hessian  # built here, because building them checks them
        if self.river_slope and self._frame.river is None:
            raise ValueError(f"`river_slope` must be 0 where the normals leave no direction for a river: got {self.river_slope!r}.")

    @cached_property
    def _frame(self) -> Frame:
        return frame(self.normals, self.center, anisotropy=self.anisotropy, river=self.river, bend=self.bend)

    @cached_property
    def _hessian(self) -> Array | None:
        return None if self.hessian is None else check_hessian(self.hessian, self._frame.dim)

    @cached_property
    def _wall(self) -> Wall:
        return Wall(self.wall, float(self.slope), float(self.saturation))

    @cached_property
    def _lattice(self) -> Lattice:
        return Lattice(float(self.step), self.limit)

    def distance(self, x: ArrayLike) -> Array:
        """Return the signed normal coordinates `(*, k)` of points `(*, d)`, in weight units."""
        return self._frame.normal(self._points(x))[0]

    def inside(self, x: ArrayLike) -> bool | NDArray[np.bool_]:
        """Return whether points `(*, d)` lie in the basin; a `bool` for one point."""
        within = self._frame.size(self.distance(x)) - self.half_width <= EDGE
        return bool(within) if within.ndim == 0 else within

    def loss(self, x: ArrayLike) -> float | Array:
        """Return the loss `(*)` of points `(*, d)`; a `float` for one point."""
        points, frame = self._points(x), self._frame
        delta = points - frame.center
        n, _ = self._frame.normal(points)
        excess = self._frame.size(n) - self.half_width
        total = self.curvature / 2 * (n**2).sum(-1) + self._wall.height(np.where(excess > EDGE, excess, 0.0))
        if frame.river is not None:
            total = total - self.river_slope * (delta @ frame.river)
        if self._hessian is not None:
            total = total + ((delta @ self._hessian) * delta).sum(-1) / 2
        return float(total) if total.ndim == 0 else total

    def gradient(self, x: ArrayLike) -> Array:
        """Return the gradient `(*, d)` at points `(*, d)`; the wall's part is exactly zero in the basin."""
        return self._gradient(self._points(x))

    def rtn(self, x: ArrayLike) -> Array:
        """Return points `(*, d)` rounded to the nearest lattice point, halves up."""
        return self._lattice.nearest(self._points(x))

    def gptq(self, x: ArrayLike, hessian: ArrayLike) -> Array:
        """Return a point `(d,)` rounded by GPTQ: coordinates in natural order, each around the optimum given those before it.

        Args:
            x: the point, `(d,)`.
            hessian: the metric, symmetric positive definite `(d, d)`; no damping is added.
        """
        return self._lattice.nearest_plane(self._point(x), check_hessian(hessian, self._frame.dim))

    def cvp(self, x: ArrayLike, hessian: ArrayLike, reach: int = 2) -> Array:
        """Return the lattice point `(d,)` closest to x in the metric, of all within `reach` steps of RTN; the first of equals.

        Raises:
            ValueError: so many dimensions that trying all is out of reach, besides arguments that are wrong by themselves.
        """
        point = self._point(x)
        values = self._lattice.around(point, _check_reach(reach))
        return closest(point, check_hessian(hessian, self._frame.dim), values, name="reach")

    def near(self, x: ArrayLike, reach: int = 1) -> Array:
        """Return every lattice point in the basin that is within `reach` steps of RTN per coordinate, `(points, d)`."""
        return self._found(combinations(self._lattice.around(self._point(x), _check_reach(reach)), name="reach"))

    def corners(self, x: ArrayLike) -> Array:
        """Return every lattice point in the basin that rounds each coordinate down or up, `(points, d)`."""
        return self._found(combinations(self._lattice.corners(self._point(x)), name="x"))

    def ste(self, x: ArrayLike, *, lr: float, steps: int) -> Recovery:
        """Train with the straight-through estimator: `w -= lr * gradient(rtn(w))`.

        Args:
            x: the latent point to start from, `(d,)`.
            lr: step size > 0.
            steps: number of steps >= 0.

        Returns:
            Every deployed and latent point, when the basin is entered, and what the theorems say about it.

        Raises:
            ValueError: arguments out of range, or a run that diverges.
        """
        point = self._point(x)
        _check_number("lr", lr, above=0.0)
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 0 <= steps < MAX_RECORD / self._frame.dim:
            raise ValueError(f"`steps` must be an integer from 0 to {MAX_RECORD // self._frame.dim:,}: got {steps!r}.")
        latent, deployed = np.empty((2, steps + 1, self._frame.dim))
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(steps + 1):
                latent[k], deployed[k] = point, self._lattice.nearest(point)
                gradient = self._gradient(deployed[k])
                if not gradient.any():  # on a flat floor the run has ended
                    latent[k + 1 :], deployed[k + 1 :] = latent[k], deployed[k]
                    break
                point = point - lr * gradient
                if not np.isfinite(point).all():
                    raise ValueError(f"`lr` must be small enough for a run that stays finite: got {lr!r}, which diverges at step {k}.")
        return Recovery(deployed, latent, np.asarray(self.inside(deployed)), self._bounds(latent[0], deployed[0], lr))

    def _gradient(self, points: Array) -> Array:
        """Return the gradient at points that need no checks."""
        frame = self._frame
        n, slopes = self._frame.normal(points)
        excess = self._frame.size(n) - self.half_width
        size = np.where(excess > EDGE, excess + self.half_width, 1.0)
        steepness = np.where(excess > EDGE, self._wall.steepness(np.maximum(excess, 0.0)), 0.0)
        force = n * (self.curvature + (steepness / size)[..., None] * frame.anisotropy**2)
        total = force @ slopes if self.bend is None else force * slopes
        if frame.river is not None:
            total = total - self.river_slope * frame.river
        if self._hessian is not None:
            total = total + (points - frame.center) @ self._hessian
        return total

    def _bounds(self, start: Array, deployed: Array, lr: float) -> Bounds:
        """Return the theorems' bounds; they hold for a straight river, a wall and curvature across it only, and an unbounded lattice."""
        if self.inside(deployed):
            return Bounds(distance=0)
        if self.bend is not None or self.river_slope or self.hessian is not None or self.limit is not None:
            return Bounds()
        frame = self._frame
        descent = Descent(frame.normals, frame.anisotropy, self.half_width, self._wall, self.curvature, self.step, lr)
        return bounds(descent, start, self.distance(start), self.distance(deployed))

    def _found(self, chunks: Iterator[Array]) -> Array:
        return np.concatenate([points[np.asarray(self.inside(points))] for points in chunks])

    def _points(self, x: ArrayLike) -> Array:
        """Return points as a float array `(*, d)`, or refuse them."""
        points = np.asarray(x, dtype=float)
        if points.ndim < 1 or points.shape[-1] != self._frame.dim:
            raise ValueError(f"`x` must have {self._frame.dim} coordinates in its last dimension: got shape {points.shape}.")
        if not np.isfinite(points).all():
            raise ValueError(f"`x` must be finite: got {points[~np.isfinite(points)][0]} among its coordinates.")
        return points

    def _point(self, x: ArrayLike) -> Array:
        points = self._points(x)
        if points.ndim != 1:
            raise ValueError(f"`x` must be one point of shape {(self._frame.dim,)}: got shape {points.shape}.")
        return points


def _check_number(name: str, value: float, *, above: float = -inf, least: float = -inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise ValueError(f"`{name}` must be a number: got {value!r}.")
    if not (isfinite(value) and value > above and value >= least):
        limits = f", above {above:g}" if above > -inf else f", {least:g} or above" if least > -inf else ""
        raise ValueError(f"`{name}` must be finite{limits}: got {value!r}.")


def _check_reach(reach: int) -> int:
    if isinstance(reach, bool) or not isinstance(reach, int | np.integer) or reach < 0:
        raise ValueError(f"`reach` must be an integer, 0 or above: got {reach!r}.")
    return int(reach)
