"""Frame: where a valley lies, and the signed normal coordinates of a point in it.

Symbols: N = normals, c = center, A = anisotropy, u = river, (b, omega) = bend. Straight: n = N (w - c). Curved, in the plane:
n = (y - b sin(omega x)) / sqrt(1 + b^2 omega^2 cos^2(omega x)), x and y the coordinates of w - c along u and along the normal.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stepwell.theory.staircase import Array

ORTHONORMAL = 1e-6


class Frame(NamedTuple):
    """The geometry of a valley, checked.

    Attributes:
        normals: orthonormal rows N, `(k, d)`.
        center: c, `(d,)`.
        anisotropy: the diagonal of A, `(k,)`.
        river: unit direction u, `(d,)`; None where the normals span everything.
        bend: (b, omega); None is straight.
    """

    normals: Array
    center: Array
    anisotropy: Array
    river: Array | None
    bend: tuple[float, float] | None

    @property
    def dim(self) -> int:
        """The number of coordinates, d."""
        return len(self.center)

    def normal(self, points: Array) -> tuple[Array, Array]:
        """Return the normal coordinates `(*, k)` of points `(*, d)` and their derivatives, `(k, d)` or `(*, d)` of a curved river."""
        delta = points - self.center
        n = delta @ self.normals.T
        if self.bend is None:
            return n, self.normals
        assert self.river is not None
        b, omega = self.bend
        along = omega * (delta @ self.river)[..., None]
        sine, cosine = np.sin(along), np.cos(along)
        root = np.sqrt(1 + (b * omega * cosine) ** 2)
        bent = (n - b * sine) / root
        # d root / dx = -b^2 omega^3 cos sin / root
        slope = -b * omega * cosine / root + bent * (b * omega) ** 2 * omega * cosine * sine / root**2
        return bent, self.normals[0] / root + slope * self.river

    def size(self, n: Array) -> Array:
        """Return the basin's norm |A n|, `(*)`, of normal coordinates `(*, k)`."""
        return np.asarray(np.sqrt(((self.anisotropy * n) ** 2).sum(-1)))


def frame(
    normals: ArrayLike,
    center: ArrayLike,
    *,
    anisotropy: ArrayLike | None = None,
    river: ArrayLike | None = None,
    bend: tuple[float, float] | None = None,
) -> Frame:
    """Return a frame from what the caller gives; the arguments are those of `Valley`.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, rows that are not orthonormal, an anisotropy that is not positive,
            a river across the valley, or a bend of anything but one normal in two dimensions.
    """
    rows = np.atleast_2d(np.asarray(normals, dtype=float))
    if rows.ndim != 2 or not 1 <= len(rows) <= rows.shape[1]:
        raise ValueError(f"`normals` must be (k, d) with 1 <= k <= d: got shape {np.shape(normals)}.")
    error = np.abs(rows @ rows.T - np.eye(len(rows))).max()
    if not error <= ORTHONORMAL:
        raise ValueError(
            f"`normals` must have orthonormal rows: got inner products that are off by {error:.3g} in {rows.tolist()}. "
            "Divide one normal by its length; of several take `numpy.linalg.qr(normals.T)[0].T`."
        )
    point = vector("center", center, rows.shape[1])
    weights = np.ones(len(rows)) if anisotropy is None else vector("anisotropy", anisotropy, len(rows))
    if weights.min() <= 0:
        raise ValueError(f"`anisotropy` must be positive: got {weights.min():g}.")
    if bend is not None:
        if rows.shape != (1, 2):
            raise ValueError(f"`bend` needs one normal in two dimensions: got normals of shape {rows.shape}.")
        amplitude, frequency = vector("bend", bend, 2)
        bend = (float(amplitude), float(frequency))
    return Frame(rows, point, weights, _river(rows, river), bend)


def vector(name: str, value: ArrayLike, size: int) -> Array:
    """Return a finite float array `(size,)`, or raise a `ValueError` that names the argument."""
    array = np.asarray(value, dtype=float)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ValueError(f"`{name}` must hold {size} finite numbers: got {value!r}.")
    return array


def _river(normals: Array, river: ArrayLike | None) -> Array | None:
    """Return the unit direction of the river; None where the normals span everything."""
    count, dim = normals.shape
    if river is None:
        if count == dim:
            return None
        outside = 1 - (normals**2).sum(0)
        axis = np.eye(dim)[int(np.round(outside, 9).argmax())]
        direction = axis - normals.T @ (normals @ axis)
        return np.asarray(direction / np.linalg.norm(direction))
    direction = vector("river", river, dim)
    length = float(np.linalg.norm(direction))
    across = np.abs(normals @ direction).max()
    if not length > 0 or across > ORTHONORMAL * length:
        raise ValueError(f"`river` must be a direction orthogonal to the normals: got {river!r}, {across:.3g} of which lies across.")
    return np.asarray(direction / length)
