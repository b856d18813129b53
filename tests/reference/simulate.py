"""Online SGD in paper notation, one sample after the other in NumPy and float64: slow, and plain enough to be read against the model.

y = w*.x / sqrt(d) + sigma xi          yhat = psi(w).phi(x) / sqrt(d)          e = y - yhat
w_i <- w_i + (eta / sqrt d) mean_b(e_b phi(x_bi)) - (eta lam / d) w_i
clipped STE: the gradient term only where |w_i| <= c
LOTION: w instead of psi(w) in yhat, and - (eta lambda rho / 2d) (lower_i + upper_i - 2 w_i), the neighbours of w_i on the lattice;
        lower + upper - 2 w = Delta (1 - 2 f) with f the position inside a cell of length Delta
PTQ: w instead of psi(w) in yhat
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

Array = np.ndarray


@dataclass
class Model:
    psi: Callable[[Array], Array]
    phi: Callable[[Array], Array]
    method: str
    eta: float
    sigma: float = 0.0
    lam: float = 0.0
    c: float = np.inf
    strength: float = 1.0
    lattice: Array | None = None
    a: float = 1.0
    rho: float = 1.0


def sgd(model: Model, w: Array, w_star: Array, x: Array, xi: Array) -> list[Array]:
    """Return the weights before the first and after every step.

    `x` is `(steps, batch, d)`, `xi` is `(steps, batch)`; both standard normal.
    """
    d, eta = len(w), model.eta
    path = [w.copy()]
    for x_step, xi_step in zip(x, xi, strict=True):
        forward = model.psi(w) if model.method in ("ste", "clipped_ste") else w
        gradient = np.zeros(d)
        for x_b, xi_b in zip(x_step, xi_step, strict=True):
            e = w_star @ x_b / np.sqrt(d) + model.sigma * xi_b - forward @ model.phi(x_b) / np.sqrt(d)
            gradient += e * model.phi(x_b) / len(x_step)
        if model.method == "clipped_ste":
            gradient[np.abs(w) > model.c] = 0
        decay = eta * model.lam / d * w
        penalty = np.zeros(d)
        if model.method == "lotion":
            lower, upper = neighbours(model.lattice, w)
            penalty = eta * model.strength * model.rho / (2 * d) * (lower + upper - 2 * w)
        w = w + eta / np.sqrt(d) * gradient - decay - penalty
        path.append(w)
    return path


def generalization_error(model: Model, weight: Array, w_star: Array) -> float:
    """Return eps_g of a weight vector, from its overlaps."""
    d = len(weight)
    return (w_star @ w_star / d - 2 * model.a * weight @ w_star / d + model.rho * weight @ weight / d) / 2


def lattice(levels: Array) -> Array:
    """Return the levels with a hundred more on either side, continued with the outermost steps."""
    more = np.arange(1, 101)
    return np.concatenate([(levels[0] - more * (levels[1] - levels[0]))[::-1], levels, levels[-1] + more * (levels[-1] - levels[-2])])


def neighbours(points: Array, w: Array) -> tuple[Array, Array]:
    """Return the nearest lattice point at or below, and above, every weight."""
    return np.max(np.where(points <= w[:, None], points, -np.inf), axis=1), np.min(np.where(points > w[:, None], points, np.inf), axis=1)


def staircase(levels: Array, temperature: float = 0.0) -> Callable[[Array], Array]:
    """Return the nearest level; at T > 0 the mean level under Gaussian noise of that width, from the probability of every cell."""
    if temperature == 0:
        return lambda v: levels[np.argmin(np.abs(v[..., None] - levels), axis=-1)]
    return lambda v: np.diff(norm.cdf((walls(levels) - v[..., None]) / temperature)) @ levels


def coefficients(levels: Array) -> tuple[float, float]:
    """Return a = E[x phi(x)] and rho = E[phi(x)^2] for x ~ N(0, 1), cell by cell."""
    return float(-np.diff(norm.pdf(walls(levels))) @ levels), float(np.diff(norm.cdf(walls(levels))) @ levels**2)


def walls(levels: Array) -> Array:
    """Return the ends of the cells of the levels, the outer ones infinite."""
    return np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
