"""One conservative step of the Fokker-Planck equation of a weight, and many of them.

In units of eta the masses P_i of the cells obey dP/dt = -div J with drift g = -U' and diffusion D = eta rho E / 2. Fluxes are
Scharfetter-Gummel, J = (D / d) (B(delta) P_i / h_i - B(-delta) P_{i+1} / h_{i+1}) with B(x) = x / (e^x - 1), where delta is the
difference of the *cell-averaged* Gibbs potentials divided by D, so that the stationary state is exact on any grid.
Crank-Nicolson in time, with four implicit half steps first; E, which couples all nodes, is extrapolated to mid-step.
Source: Scharfetter and Gummel, IEEE Transactions on Electron Devices 16 (1969); Rannacher, Numerische Mathematik 43 (1984).
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_banded

from stepwell.theory.scheme import HALF_STEPS, SMALLEST, STEEP, VOID
from stepwell.theory.staircase import Array


class Landscape(NamedTuple):
    """What drives the masses, on one grid for all teacher nodes."""

    width: Array
    """h, `(cells,)`"""
    gap: Array
    """d, distances between the centres of neighbours; the first and last are half cells, `(cells + 1,)`"""
    potential: Array
    """U at the centres, framed by U at the two ends, `(nodes, cells + 2)`"""
    force: Array
    """-U' at the centres, `(nodes, cells)`"""
    energy: Array
    """E is `energy_offset` plus the sum of this times the masses, `(nodes, cells + 2)`, first and last for the atoms"""
    energy_offset: float
    diffusion: float
    """D per unit of E: eta rho / 2"""
    open: bool
    """whether the ends absorb; otherwise they reflect"""


class Steps(NamedTuple):
    """A time grid."""

    length: Array
    """eta times the duration of each step, `(steps,)`"""
    output: Array
    """number of steps done before each output, `(times,)`"""


class Path(NamedTuple):
    """What is kept of a solve."""

    observed: Array
    """functionals at the outputs, `(functionals, times)`"""
    energy: Array
    """E after every step, `(steps + 1,)`"""
    masses: Array
    """masses at the outputs, `(times, nodes, cells + 2)`; `(0, ...)` unless they are kept"""


def evolve(landscape: Landscape, masses: Array, steps: Steps, *, functionals: Array, keep: bool) -> Path:
    """Move the masses through all steps.

    Args:
        landscape: grid, potential and the functional that gives E.
        masses: start, `(nodes, cells + 2)`, first and last are the atoms beyond the ends.
        steps: time grid.
        functionals: what is summed against the masses at the outputs, `(functionals, nodes, cells + 2)`.
        keep: return the masses at the outputs as well.
    """
    try:
        from stepwell.theory.compiled import evolve as compiled
    except ImportError:
        return evolve_plainly(landscape, masses, steps, functionals=functionals, keep=keep)
    return Path(*compiled(*landscape, masses, *steps, functionals, keep))


def evolve_plainly(landscape: Landscape, masses: Array, steps: Steps, *, functionals: Array, keep: bool) -> Path:
    """The same with numpy and scipy alone."""
    P = masses.copy()
    energy = [_energy(landscape, P)]
    observed, kept = np.empty((len(functionals), len(steps.output))), np.empty((len(steps.output) if keep else 0, *P.shape))
    k, previous = 0, 0.0
    for n in range(len(steps.length) + 1):
        while k < len(steps.output) and steps.output[k] == n:
            observed[:, k] = np.einsum("fnc,nc->f", functionals, P)
            if keep:
                kept[k] = P
            k += 1
        if n == len(steps.length):
            break
        tau = steps.length[n]
        slope = (energy[-1] - energy[-2]) / previous if n else 0.0
        middle = energy[-1] + slope * tau / 2
        P = _step(landscape, P, max(middle if middle > 0 else energy[-1], SMALLEST), tau, implicit=n < HALF_STEPS)
        energy.append(_energy(landscape, P))
        previous = tau
    return Path(observed, np.array(energy), kept)


def _energy(landscape: Landscape, P: Array) -> float:
    return landscape.energy_offset + float(np.sum(landscape.energy * P))


def _step(landscape: Landscape, P: Array, energy: float, tau: float, *, implicit: bool) -> Array:
    """Return the masses after one step: implicit Euler, or Crank-Nicolson as 2 (I - tau/2 L)^-1 P - P."""
    D = landscape.diffusion * energy
    nodes, cells = landscape.force.shape
    phi = landscape.potential / D
    phi[:, 1:-1] -= log_sinhc(landscape.force * landscape.width / (2 * D))
    delta = np.diff(phi, axis=1)
    forward, rate = bernoulli(delta), D / landscape.gap
    up = rate[:-1] * (forward[:, :-1] + delta[:, :-1])  # B(-x) = B(x) + x: what leaves a cell to the left
    right = rate[1:] * forward[:, 1:]
    if not landscape.open:
        up[:, 0], right[:, -1] = 0.0, 0.0
    left_out, right_out = up / landscape.width, right / landscape.width
    theta = tau if implicit else tau / 2
    bands = np.zeros((3, nodes, cells))
    bands[1] = 1 + theta * (left_out + right_out)
    bands[0, :, 1:] = -theta * left_out[:, 1:]
    bands[2, :, :-1] = -theta * right_out[:, :-1]
    inside = P[:, 1:-1]
    solved = solve_banded((1, 1), bands.reshape(3, -1), inside.ravel(), check_finite=False).reshape(nodes, cells)
    new = P.copy()
    new[:, 0] += tau * left_out[:, 0] * solved[:, 0]
    new[:, -1] += tau * right_out[:, -1] * solved[:, -1]
    moved = solved if implicit else 2 * solved - inside
    new[:, 1:-1] = np.where(np.abs(moved) > VOID, moved, 0.0)
    return new


def bernoulli(x: Array) -> Array:
    """Return x / (exp(x) - 1), elementwise."""
    small = np.abs(x) < 0.03
    safe = np.where(small, 1.0, np.clip(x, -STEEP, STEEP))
    return np.where(small, 1 - x / 2 + x * x / 12 - x**4 / 720, np.where(x > STEEP, 0.0, np.where(x < -STEEP, -x, safe / np.expm1(safe))))


def log_sinhc(z: Array) -> Array:
    """Return log(sinh(z) / z), elementwise: the logarithm of a cell's mean Gibbs factor."""
    y = np.abs(z)
    small = y < 0.3
    safe = np.where(small, 1.0, y)
    y2 = np.minimum(y, 1.0) ** 2
    series = y2 / 6 * (1 - y2 / 30 * (1 - y2 * 4 / 63 * (1 - y2 * 3 / 40)))
    return np.where(small, series, safe + np.log(-np.expm1(-2 * safe) / (2 * safe)))
