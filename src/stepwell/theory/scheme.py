"""What the plain and the compiled loops share: the constants of the Fokker-Planck scheme, and the closure as scalar arithmetic."""

from math import erfc, exp, sqrt

import numpy as np

from stepwell.theory.staircase import Array

SMALLEST = 1e-13  # D stays positive where all noise dies out
STEEP = 60.0  # exp(-60) is nothing beside 1
VOID = 1e-100  # masses below are dropped: denormal numbers are slow
HALF_STEPS = 4  # implicit half steps at the start


def hard_order_parameters(t: float, y: Array, constants: Array, levels: Array, thresholds: Array, gauss: bool) -> Array:
    """Return `closure.order_parameters` at temperature 0, as loops; thresholds beyond 7 s are skipped, where Phi is 0 or 1."""
    a, rho, eta, lam, R, noise, floor = constants
    m, v = y[0], max(y[1], 0.0)
    mu, s = (0.0, sqrt(v + m * m / R)) if gauss else (m / sqrt(R), sqrt(v))
    s = max(s, floor)
    first = np.searchsorted(thresholds, mu - 7 * s)
    mean, square, slope = levels[first], levels[first] ** 2, 0.0
    for k in range(first, len(thresholds)):
        z = (thresholds[k] - mu) / s
        if z > 7:
            break
        above, step = 0.5 * erfc(z * 0.7071067811865476), levels[k + 1] - levels[k]
        mean += step * above
        square += step * (levels[k + 1] + levels[k]) * above
        slope += step * exp(-0.5 * z * z) * 0.3989422804014327 / s
    out = np.empty(2)
    if gauss:
        m_psi = m * slope  # (m / q) r_psi with r_psi = q E[psi']
        force = a * R - rho * m_psi - lam * m
        out[1] = -2 * eta * (rho * slope + lam) * v
    else:
        m_psi = sqrt(R) * mean
        force = a * R - rho * m_psi - lam * m
        out[1] = -2 * eta * (rho * slope + lam) * s * s
    out[0] = eta * force
    out[1] += eta * eta * rho * (R + noise * noise - 2 * a * m_psi + rho * square)
    return out
