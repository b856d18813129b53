"""The integer lattice of the valley: rounding half up, Babai's nearest plane (which is GPTQ), and exhaustive search.

Source: GPTQ equals Babai's algorithm on the lattice with the layer's Hessian as metric (arXiv:2507.18553).
Symbols: H = hessian, M = lower-triangular factor with H = M^T M, so that row i of M (q - w) holds coordinates 0..i only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stepwell.theory.staircase import Array

MAX_POINTS = 20_000_000  # a search of this many points takes some ten seconds
CHUNK = 1 << 18


class Lattice(NamedTuple):
    """The points `step * z` with integer z, at most `limit` in size where a limit is given: a grid of 2 limit + 1 codes."""

    step: float
    limit: int | None

    def nearest(self, x: Array) -> Array:
        """Return the closest point, elementwise; halves go up."""
        return self._point(np.floor(x / self.step + 0.5))

    def corners(self, x: Array) -> Array:
        """Return the floor and the ceil of every coordinate, `(2, d)`."""
        codes = x / self.step
        return self._point(np.stack([np.floor(codes), np.ceil(codes)]))

    def around(self, x: Array, reach: int) -> Array:
        """Return, for every coordinate, the points within `reach` steps of the closest one, `(2 reach + 1, d)`."""
        offsets = np.arange(-reach, reach + 1, dtype=float)[:, None]
        return self._point(np.floor(x / self.step + 0.5) + offsets)

    def nearest_plane(self, x: Array, hessian: Array) -> Array:
        """Return Babai's nearest plane: each coordinate in turn is rounded around the optimum given those before it."""
        factor = np.flip(np.linalg.cholesky(np.flip(hessian))).T
        error = np.zeros_like(x)
        for i, row in enumerate(factor):
            wanted = x[i] - row[:i] @ error[:i] / row[i]
            error[i] = self.nearest(wanted) - x[i]
        # the point itself and not x + error, which may be an ulp off the lattice
        return self.nearest(x + error)

    def _point(self, codes: Array) -> Array:
        if self.limit is not None:
            codes = np.clip(codes, -self.limit, self.limit)
        return codes * self.step + 0.0  # the sum turns -0 into 0


def combinations(values: Array, *, name: str) -> Iterator[Array]:
    """Yield all points whose coordinate i is one of `values[:, i]`, as `(points, d)` chunks in lexicographic order; each point once.

    Raises:
        ValueError: more than `MAX_POINTS` of them; `name` is the argument that the message tells to reduce.
    """
    axes = [np.unique(column) for column in values.T]
    count = float(np.prod([float(len(axis)) for axis in axes]))
    if count > MAX_POINTS:
        raise ValueError(
            f"`{name}` asks for a search of {count:.3g} points in {len(axes)} dimensions: at most {MAX_POINTS:,} are tried. "
            "Take fewer dimensions or a smaller reach."
        )
    shape = tuple(len(axis) for axis in axes)
    for start in range(0, int(count), CHUNK):
        index = np.unravel_index(np.arange(start, min(start + CHUNK, int(count))), shape)
        yield np.stack([axis[i] for axis, i in zip(axes, index, strict=True)], axis=1)


def closest(x: Array, hessian: Array, values: Array, *, name: str) -> Array:
    """Return the point of `combinations` that minimises `(q - x)^T H (q - x)`; of equal ones the first."""
    best, least = x, np.inf
    for points in combinations(values, name=name):
        delta = points - x
        cost = np.einsum("pi,ij,pj->p", delta, hessian, delta, optimize=True)
        k = int(cost.argmin())
        if cost[k] < least:
            best, least = points[k], float(cost[k])
    return best


def check_hessian(hessian: ArrayLike, dim: int) -> Array:
    """Return a Hessian as a float array `(dim, dim)`.

    Raises:
        ValueError: another shape, not finite, not symmetric, or not positive definite.
    """
    matrix = np.asarray(hessian, dtype=float)
    if matrix.shape != (dim, dim):
        raise ValueError(f"`hessian` must have shape {(dim, dim)}: got {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError(f"`hessian` must be finite: got {matrix[~np.isfinite(matrix)][0]} among its entries.")
    asymmetry = float(np.abs(matrix - matrix.T).max())
    if asymmetry > 1e-9 * np.abs(matrix).max():
        raise ValueError(f"`hessian` must be symmetric: got entries that differ by {asymmetry:g} from their mirror image.")
    smallest = float(np.linalg.eigvalsh(matrix)[0])
    if smallest <= 0:
        raise ValueError(f"`hessian` must be positive definite: got a smallest eigenvalue of {smallest:g}. Add a damping to its diagonal.")
    return matrix
