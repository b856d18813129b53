"""The closed equations in paper notation: every Gaussian expectation by numerical integration, the order parameters (m, q) themselves.

dm/dt = eta (a R - rho m_psi - lam m)
dq/dt = 2 eta (a m - rho r_psi - lam q) + eta^2 rho E        E = R + sigma^2 - 2 a m_psi + rho q_psi
eps_g = (R - 2 a m_psi + rho q_psi) / 2
"""

import itertools
from math import exp, pi, sqrt

import numpy as np
from scipy.integrate import quad, solve_ivp


def mean(f, mu, s, breaks=()):
    """E f(w) for w ~ N(mu, s^2)."""
    low, high = mu - 12 * s, mu + 12 * s
    points = [low, *sorted(b for b in breaks if low < b < high), high]
    density = lambda w: f(w) * exp(-(((w - mu) / s) ** 2) / 2) / (s * sqrt(2 * pi))  # noqa: E731
    return sum(quad(density, x, y, epsabs=1e-11, epsrel=1e-11, limit=200)[0] for x, y in itertools.pairwise(points))


def moments(psi, breaks, m, q, teacher, R):
    """m_psi = E[w* psi], q_psi = E[psi^2], r_psi = E[w psi] under the closure."""
    if teacher == "one":
        mu, s = m / np.sqrt(R), np.sqrt(q - m * m / R)
        m_psi = np.sqrt(R) * mean(psi, mu, s, breaks)
    else:
        mu, s = 0.0, np.sqrt(q)
        # w* given w is N(m w / q, ..): its mean is all that enters.
        m_psi = mean(lambda w: m * w / q * psi(w), mu, s, breaks)
    return m_psi, mean(lambda w: psi(w) ** 2, mu, s, breaks), mean(lambda w: w * psi(w), mu, s, breaks)


def error(psi, breaks, m, q, *, a, rho, teacher="one", R=1.0):
    m_psi, q_psi, _ = moments(psi, breaks, m, q, teacher, R)
    return (R - 2 * a * m_psi + rho * q_psi) / 2


def solve(psi, breaks, times, *, eta, a=1.0, rho=1.0, sigma=0.0, lam=0.0, teacher="one", R=1.0, m0=0.0, v0=1.0):
    """eps_g at the times."""

    def derivative(t, y):
        m, q = y
        m_psi, q_psi, r_psi = moments(psi, breaks, m, q, teacher, R)
        E = R + sigma**2 - 2 * a * m_psi + rho * q_psi
        return [eta * (a * R - rho * m_psi - lam * m), 2 * eta * (a * m - rho * r_psi - lam * q) + eta**2 * rho * E]

    y = solve_ivp(derivative, (0, times[-1]), [m0, v0 + m0**2 / R], t_eval=times, rtol=1e-7, atol=1e-9).y
    return np.array([error(psi, breaks, m, q, a=a, rho=rho, teacher=teacher, R=R) for m, q in y.T])
