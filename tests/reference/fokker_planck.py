"""The exact limit in paper notation: central differences on an even grid, classical Runge-Kutta steps small enough to be stable.

dp/dt = - d/dw [eta g p] + (eta^2 rho E / 2) d^2p/dw^2       g: the drift over eta, given by the caller
One row of p per teacher value; only E couples them. Absorbing ends: p = 0 there, what flows out is counted.
"""

import numpy as np
from scipy.stats import norm


def solve(drift, energy, observe, times, *, eta, rho, w_star, mass, edges, m0=0.0, v0=1.0, R=1.0, absorbing=False, cfl=0.5):
    """Observables at the times.

    drift(w, w_star) -> g at the faces; energy(w, w_star, P, lost) -> E; observe(...) -> what to return; P are masses of the cells
    weighted by `mass`, `(nodes, cells)`; lost is what went through the two ends, `(nodes, 2)`.
    """
    h = edges[1] - edges[0]
    w, faces = (edges[1:] + edges[:-1]) / 2, edges[1:-1]
    P = np.diff(norm.cdf(edges[None], (m0 / R * w_star)[:, None], np.sqrt(v0)), axis=1) * mass[:, None]
    lost = np.stack([norm.cdf(edges[0], m0 / R * w_star, np.sqrt(v0)), norm.sf(edges[-1], m0 / R * w_star, np.sqrt(v0))], 1) * mass[:, None]
    if not absorbing:
        P[:, 0], P[:, -1], lost = P[:, 0] + lost[:, 0], P[:, -1] + lost[:, 1], 0 * lost
    g = drift(faces[None], w_star[:, None])

    def flux(P, lost):
        D = eta**2 * rho * energy(w, w_star, P, lost) / 2
        p = P / h
        J = np.zeros((len(w_star), len(edges)))
        J[:, 1:-1] = eta * g * (p[:, 1:] + p[:, :-1]) / 2 - D * np.diff(p, axis=1) / h
        if absorbing:
            J[:, 0], J[:, -1] = -2 * D * p[:, 0] / h, 2 * D * p[:, -1] / h
        return -np.diff(J, axis=1), np.stack([-J[:, 0], J[:, -1]], 1)

    out, t = [], 0.0
    for end in times:
        largest = eta**2 * rho * max(energy(w, w_star, P, lost), 0.5) / 2
        steps = int(np.ceil((end - t) * largest / h**2 / cfl)) if end > t else 0
        for _ in range(steps):
            dt = (end - t) / steps
            a, A = flux(P, lost)
            b, B = flux(P + dt / 2 * a, lost + dt / 2 * A)
            c, C = flux(P + dt / 2 * b, lost + dt / 2 * B)
            d, D = flux(P + dt * c, lost + dt * C)
            P, lost = P + dt / 6 * (a + 2 * b + 2 * c + d), lost + dt / 6 * (A + 2 * B + 2 * C + D)
        t = end
        out.append(observe(w, w_star, P, lost))
    return np.array(out)
