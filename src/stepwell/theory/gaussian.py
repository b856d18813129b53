"""Gaussian integrals of a staircase, in closed form.

For w ~ N(mu, s^2) and z_k = (theta_k - mu) / S with S^2 = s^2 + T^2:
E[psi] = l_0 + sum_k step_k Phi(-z_k),  E[psi'] = sum_k step_k n(z_k) / S,  E[w psi] = mu E[psi] + s^2 E[psi'].
E[psi^2] at T = 0 is l_0^2 + sum_k (l_k^2 - l_{k-1}^2) Phi(-z_k). At T > 0 it needs bivariate normal probabilities with
correlation s^2 / S^2; the formula of T = 0 with S in place of s would be wrong.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, owens_t

from stepwell.theory.staircase import Array, Staircase

FLOOR = 1e-9
CHUNK = 2_000_000
NEVER_ZERO = 1e-150  # the formula divides by its arguments


def levels(staircase: Staircase, mu: ArrayLike, s: ArrayLike) -> tuple[Array, Array]:
    """Return E[psi] and E[psi^2] alone, for a hard staircase in two thirds of the time of `moments`."""
    if staircase.temperature > 0 or np.size(mu) * len(staircase.thresholds) > CHUNK:
        g = moments(staircase, mu, s)
        return g.mean, g.square
    mu_, s_ = np.asarray(mu, dtype=float), np.maximum(s, FLOOR * staircase.range)
    above = ndtr((mu_[..., None] - staircase.thresholds) / s_[..., None])
    low = staircase.levels[0]
    return low + above @ staircase.steps, low**2 + above @ np.diff(staircase.levels**2)


class Moments(NamedTuple):
    """Expectations under w ~ N(mu, s^2), each of the broadcast shape of mu and s."""

    mean: Array
    """E[psi(w)]"""
    square: Array
    """E[psi(w)^2]"""
    slope: Array
    """E[psi'(w)], the derivative in the sense of distributions"""
    product: Array
    """E[w psi(w)]"""


def moments(staircase: Staircase, mu: ArrayLike, s: ArrayLike) -> Moments:
    """Return the Gaussian expectations of a staircase.

    Args:
        staircase: psi, hard or smooth.
        mu: means, weight units.
        s: standard deviations >= 0, broadcast against `mu`; below 1e-9 of the range they are raised to that.

    Returns:
        `Moments`, each of the broadcast shape.

    >>> round(float(moments(Staircase(bits=1, range=2.0), 0.0, 1.0).product), 6)  # 2 E|g|
    1.595769
    """
    mu_, s_ = np.broadcast_arrays(np.asarray(mu, dtype=float), np.asarray(s, dtype=float))
    shape = mu_.shape
    mu_, s_ = mu_.ravel(), np.maximum(s_.ravel(), FLOOR * staircase.range)
    rows = max(1, CHUNK // len(staircase.thresholds))
    parts = [_moments(staircase, mu_[k : k + rows], s_[k : k + rows]) for k in range(0, len(mu_), rows)] or [_moments(staircase, mu_, s_)]
    return Moments(*(np.concatenate(part).reshape(shape) for part in zip(*parts, strict=True)))


def _moments(staircase: Staircase, mu: Array, s: Array) -> Moments:
    levels, steps = staircase.levels, staircase.steps
    S = np.hypot(s, staircase.temperature)
    z = (staircase.thresholds - mu[:, None]) / S[:, None]
    above = ndtr(-z)
    mean = levels[0] + above @ steps
    slope = np.exp(-0.5 * z * z) @ steps / (S * np.sqrt(2 * np.pi))
    if staircase.temperature == 0:
        square = levels[0] ** 2 + above @ np.diff(levels**2)
    else:
        square = levels[0] ** 2 + 2 * levels[0] * (mean - levels[0])
        square = square + np.array([_pairs(staircase, *row) for row in zip(z, above, s / S, strict=True)])
    return Moments(mean, square, slope, mu * mean + s * s * slope)


def _pairs(staircase: Staircase, z: Array, above: Array, ratio: float) -> float:
    """Return sum_{k,l} step_k step_l P(u > z_k, u' > z_l) for standard normals with correlation ratio^2."""
    steps, r = staircase.steps, ratio * ratio
    joint = np.minimum(above[:, None], above[None, :])  # exact where the two thresholds are many temperatures apart
    spread = np.sqrt(2 * (1 - r))  # of u - u'
    first, second = np.nonzero(np.abs(z[:, None] - z[None, :]) < 12 * spread)
    joint[first, second] = bivariate(-z[first], -z[second], r)
    return float(steps @ joint @ steps)


def bivariate(h: Array, k: Array, r: float) -> Array:
    """Return P(u < h, u' < k), elementwise, for standard normals with correlation r in [0, 1).

    Owen's formula through his T function (D. B. Owen, Annals of Mathematical Statistics 27, 1956).
    """
    root = np.sqrt((1 - r) * (1 + r))
    h, k = np.where(h == 0, NEVER_ZERO, h), np.where(k == 0, NEVER_ZERO, k)
    opposite = np.where((h < 0) != (k < 0), 0.5, 0.0)
    with np.errstate(over="ignore"):
        corners = owens_t(h, (k - r * h) / (h * root)) + owens_t(k, (h - r * k) / (k * root))
    return np.asarray(0.5 * (ndtr(h) + ndtr(k)) - opposite - corners)
