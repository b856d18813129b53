"""Stationary laws in paper notation.

Hard STE, one teacher value: p ~ exp((2 / (eta E)) (tau w - Psi(w))), slope (2 / (eta E)) (tau - l_k) in cell k, cell masses in
closed form, one scalar equation E = R (1 - a^2 / rho) + sigma^2 + rho Var(psi).
LOTION: p ~ exp(-(2 / (eta E)) [w^2 / 2 - tau w + (lambda / 2) Delta^2 f (1 - f)]), by a sum over a very fine grid.
"""

import numpy as np
from scipy.optimize import brentq


def cell_masses(levels, tau, eta, E):
    """P(psi = l_k), for levels[0] < tau < levels[-1]."""
    thresholds = (levels[1:] + levels[:-1]) / 2
    slope = 2 / (eta * E) * (tau - levels)
    log_p = np.concatenate([[0.0], np.cumsum(slope[1:-1] * np.diff(thresholds))])  # at the thresholds
    log_mass = np.empty(len(levels))
    log_mass[0], log_mass[-1] = log_p[0] - np.log(slope[0]), log_p[-1] - np.log(-slope[-1])
    for k in range(1, len(levels) - 1):
        length, c = thresholds[k] - thresholds[k - 1], slope[k]
        high = log_p[k] if c > 0 else log_p[k - 1]
        log_mass[k] = high + (np.log(-np.expm1(-abs(c) * length) / abs(c)) if abs(c) * length > 1e-12 else np.log(length))
    p = np.exp(log_mass - log_mass.max())
    return p / p.sum()


def ste(levels, *, eta, a=1.0, rho=1.0, sigma=0.0, R=1.0):
    """eps_g at the fixed point."""
    tau, rest = a * np.sqrt(R) / rho, R * (1 - a * a / rho)

    def variance(E):
        p = cell_masses(levels, tau, eta, E)
        return p @ levels**2 - (p @ levels) ** 2

    E = brentq(lambda E: rest + sigma**2 + rho * variance(E) - E, 1e-7, 1e3, xtol=1e-13)
    return (E - sigma**2) / 2


def lotion(spacing, offset, psi, *, eta, strength, sigma=0.0, lam=0.0, half=6.0, points=1_200_001):
    """eps_g of rounded, latent and randomized weights at the fixed point, weights only, w* = 1."""
    w = np.linspace(-half, half, points)
    f = ((w - offset) / spacing) % 1
    variance = spacing**2 * f * (1 - f)

    def law(E):
        log_p = -2 / (eta * E) * (w * w / 2 - w + strength / 2 * variance + lam * w * w / 2)
        p = np.exp(log_p - log_p.max())
        return p / p.sum()

    latent = lambda p: (1 - 2 * p @ w + p @ w**2) / 2  # noqa: E731
    E = brentq(lambda E: 2 * latent(law(E)) + sigma**2 - E, 1e-4, 10)
    p = law(E)
    rounded = psi(w)
    return (1 - 2 * p @ rounded + p @ rounded**2) / 2, latent(p), latent(p) + p @ variance / 2
