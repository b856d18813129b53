"""One step of the finite-volume scheme: conservation, stationarity, and the compiled loop against the plain one."""

import numpy as np
import pytest
from tests.theory.rows import ROWS

from stepwell.theory.fokker_planck import Steps, bernoulli, evolve_plainly, log_sinhc
from stepwell.theory.landscape import build, start, teacher_nodes
from stepwell.theory.mesh import cut, mesh, scales


def prepared(name, nodes=5):
    p, horizon = ROWS[name].problem, 4.0
    nodes = teacher_nodes(p, nodes)
    edges = mesh(p, p.weights, horizon, scales(p, p.weights, horizon), layers=8.0)
    landscape, observables = build(p, p.weights, nodes, edges)
    return landscape, observables.functional, start(p, nodes, edges), cut(np.array([0.0, 1.0, 4.0]), p.lr, 0)


@pytest.mark.parametrize("name", ["P1", "P5", "P8", "P9", "P11"])
def test_the_compiled_loop_does_the_same_arithmetic(name):
    pytest.importorskip("numba")
    from stepwell.theory.fokker_planck import evolve

    landscape, functionals, masses, steps = prepared(name)
    plain = evolve_plainly(landscape, masses, steps, functionals=functionals, keep=True)
    fast = evolve(landscape, masses, steps, functionals=functionals, keep=True)
    for ours, theirs in zip(fast, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["P1", "P5", "P9", "P11"])
def test_mass_is_conserved_and_densities_are_positive(name):
    landscape, functionals, masses, steps = prepared(name)
    path = evolve_plainly(landscape, masses, steps, functionals=functionals, keep=True)
    np.testing.assert_allclose(path.masses.sum(axis=2), 1.0, atol=1e-12)
    assert path.masses.min() >= -1e-9  # Crank-Nicolson is positive only up to its own error


def test_implicit_steps_are_positive_whatever_their_length():
    landscape, functionals, masses, _ = prepared("P1")
    path = evolve_plainly(landscape, masses, Steps(np.full(4, 50.0), np.arange(5)), functionals=functionals, keep=True)
    assert path.masses.min() >= 0


def test_the_gibbs_law_does_not_move_on_any_grid():
    # with E frozen at 0.4: exp(-U / D) averaged over each cell, here by brute force inside the cells
    landscape, functionals, masses, _ = prepared("P1")
    D = landscape.diffusion * 0.4
    frozen = landscape._replace(energy=0 * landscape.energy, energy_offset=0.4)
    inside = (np.arange(400) + 0.5) / 400 - 0.5
    exponent = -landscape.potential[0, 1:-1, None] / D + landscape.force[0, :, None] * landscape.width[:, None] * inside / D
    gibbs = np.zeros_like(masses)
    gibbs[0, 1:-1] = np.exp(exponent - exponent.max()).mean(axis=1) * landscape.width
    gibbs /= gibbs.sum()
    path = evolve_plainly(frozen, gibbs, Steps(np.full(50, 0.3), np.array([50])), functionals=functionals, keep=True)
    np.testing.assert_allclose(path.masses[0], gibbs, atol=2e-6)  # midpoint rule: (slope h)^2 / (24 400^2) of a mass


def test_special_functions_near_and_far_from_zero():
    x = np.array([-80.0, -5.0, -0.02, 0.0, 1e-9, 0.029999, 0.030001, 3.0, 59.0, 80.0])
    with np.errstate(invalid="ignore", over="ignore"):
        want = np.where(x == 0, 1.0, x / np.expm1(np.where(x == 0, 1.0, x)))
    np.testing.assert_allclose(bernoulli(x), want, rtol=1e-12, atol=1e-23)
    z = np.array([1e-4, 0.1, 0.29999, 0.30001, 2.0, 50.0])
    np.testing.assert_allclose(log_sinhc(z), np.log(np.sinh(z) / z), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(log_sinhc(-z), log_sinhc(z))
    assert log_sinhc(np.array([0.0]))[0] == 0
    assert log_sinhc(np.array([1e4]))[0] == pytest.approx(1e4 - np.log(2e4))
