"""The solvers' inner loops, compiled by numba. Imported only by functions that have a plain twin for when numba is absent."""

from math import exp, expm1, log

import numpy as np
from numba import njit

from stepwell.theory.scheme import HALF_STEPS, SMALLEST, STEEP, VOID, hard_order_parameters
from stepwell.theory.staircase import Array

order_parameters = njit(cache=True, nogil=True)(hard_order_parameters)


@njit(cache=True, nogil=True, inline="always")
def bernoulli(x: float) -> float:
    """As in `fokker_planck`."""
    if abs(x) < 0.03:
        return 1 - x / 2 + x * x / 12 - x**4 / 720
    if x > STEEP:
        return 0.0
    if x < -STEEP:
        return -x
    return x / (exp(x) - 1)


@njit(cache=True, nogil=True, inline="always")
def log_sinhc(z: float) -> float:
    """As in `fokker_planck`."""
    y = abs(z)
    if y < 0.3:
        y2 = y * y
        return y2 / 6 * (1 - y2 / 30 * (1 - y2 * 4 / 63 * (1 - y2 * 3 / 40)))
    return y + log(-expm1(-2 * y) / (2 * y))


@njit(cache=True, nogil=True)
def step(
    width: Array, gap: Array, potential: Array, force: Array, D: float, opened: bool, P: Array, tau: float, implicit: bool, work: Array
) -> None:
    """Move the masses of one node in place: the Thomas algorithm on the matrix of `fokker_planck._step`."""
    cells = len(width)
    theta = tau if implicit else tau / 2
    solved, ratio = work[0], work[1]
    inverse = 1 / D
    tilt = force[0] * width[0]
    gibbs = log_sinhc(tilt * 0.5 * inverse)
    phi = potential[1] * inverse - gibbs
    delta = phi - potential[0] * inverse
    into_left = (bernoulli(delta) + delta) * D / gap[0] / width[0] if opened else 0.0
    first = into_left
    from_left = 0.0  # rate out of the cell on the left into this one
    for i in range(cells):
        if i + 1 < cells:
            if force[i + 1] * width[i + 1] != tilt:  # equal in most neighbours: the logarithm is worth a comparison
                tilt = force[i + 1] * width[i + 1]
                gibbs = log_sinhc(tilt * 0.5 * inverse)
            after = potential[i + 2] * inverse - gibbs
        else:
            after = potential[i + 2] * inverse
        delta = after - phi
        b = bernoulli(delta)
        rate = D / gap[i + 1]
        out_right, next_left = rate * b / width[i], 0.0
        if i + 1 < cells:
            next_left = rate * (b + delta) / width[i + 1]
        elif not opened:
            out_right = 0.0
        diagonal = 1 + theta * (into_left + out_right)
        lower = -theta * from_left
        previous_ratio = ratio[i - 1] if i else 0.0
        previous = solved[i - 1] if i else 0.0
        pivot = 1 / (diagonal - lower * previous_ratio)
        ratio[i] = -theta * next_left * pivot
        solved[i] = (P[i + 1] - lower * previous) * pivot
        from_left, into_left, phi = out_right, next_left, after
    for i in range(cells - 2, -1, -1):
        solved[i] -= ratio[i] * solved[i + 1]
    P[0] += tau * first * solved[0]
    P[cells + 1] += tau * from_left * solved[cells - 1]
    for i in range(cells):
        mass = solved[i] if implicit else 2 * solved[i] - P[i + 1]
        P[i + 1] = mass if abs(mass) > VOID else 0.0


@njit(cache=True, nogil=True)
def evolve(
    width: Array, gap: Array, potential: Array, force: Array, energy: Array, energy_offset: float, diffusion: float, opened: bool,
    masses: Array, length: Array, output: Array, functionals: Array, keep: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """As `fokker_planck.evolve_plainly`, with the records laid out flat."""
    nodes, size = masses.shape
    P = masses.copy()
    work = np.empty((2, size))
    observed = np.zeros((len(functionals), len(output)))
    kept = np.empty((len(output) if keep else 0, nodes, size))
    E = np.empty(len(length) + 1)
    E[0] = energy_offset + np.sum(energy * P)
    k = 0
    for n in range(len(length) + 1):
        while k < len(output) and output[k] == n:
            for f in range(len(functionals)):
                for j in range(nodes):
                    for i in range(size):
                        observed[f, k] += functionals[f, j, i] * P[j, i]
            if keep:
                kept[k] = P
            k += 1
        if n == len(length):
            break
        tau = length[n]
        middle = E[n] + (0.0 if n == 0 else (E[n] - E[n - 1]) / length[n - 1] * tau / 2)
        middle = max(middle if middle > 0 else E[n], SMALLEST)
        total = 0.0
        for j in range(nodes):
            step(width, gap, potential[j], force[j], diffusion * middle, opened, P[j], tau, n < HALF_STEPS, work)
            for i in range(size):
                total += energy[j, i] * P[j, i]
        E[n + 1] = energy_offset + total
    return observed, E, kept
