"""The solver's grids: kinks on faces, nested refinement, outputs on steps."""

import numpy as np
import pytest
from tests.theory.rows import ROWS

from stepwell.theory import Problem, Staircase
from stepwell.theory.cells import cells, integral, lattice, rounding_variance, rounding_variance_integral
from stepwell.theory.mesh import MOST_CELLS, MOST_STEPS, cut, halved, mesh, scales

UNEVEN = Staircase(3, 2.0, "levels", values=(-2.0, -0.9, -0.2, 0.1, 1.4, 1.9))


@pytest.mark.parametrize("name", ["P1", "P2", "P4", "P5", "P7", "P8", "P11"])
def test_thresholds_lie_on_faces_and_cells_grow_slowly(name):
    p = ROWS[name].problem
    edges = mesh(p, p.weights, 20.0, scales(p, p.weights, 20.0), layers=2.0)
    assert np.all(np.diff(edges) > 0)
    distance = np.abs(edges[:, None] - p.weights.thresholds).min(axis=0)
    assert distance.max() < 1e-12
    width = np.diff(edges)
    assert np.max(width[1:] / width[:-1]) < 1.2


def test_lotion_has_levels_and_midpoints_on_faces():
    p = ROWS["P9"].problem
    edges = mesh(p, p.weights, 20.0, scales(p, p.weights, 20.0), layers=2.0)
    both = np.concatenate([p.weights.levels, p.weights.thresholds])
    assert np.abs(edges[:, None] - both).min(axis=0).max() < 1e-12


def test_clipped_ste_ends_at_the_clip_range():
    p = Problem(Staircase(3, 2.0), method="clipped_ste", clip=1.3)
    edges = mesh(p, p.weights, 20.0, scales(p, p.weights, 20.0), layers=2.0)
    assert (edges[0], edges[-1]) == (-1.3, 1.3)


def test_halving_keeps_every_edge():
    edges = np.array([0.0, 1.0, 4.0])
    np.testing.assert_array_equal(halved(edges), [0, 0.5, 1, 2.5, 4])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_outputs_fall_on_steps(level):
    times = np.array([0.0, 0.001, 3.0, 3.5, 40.0])
    steps = cut(times, 0.2, level)
    reached = np.concatenate([[0.0], np.cumsum(steps.length)])[steps.output]
    np.testing.assert_allclose(reached, times * 0.2, rtol=1e-12)
    assert np.all(steps.length > 0)


def test_a_single_output_at_the_start_needs_no_step():
    steps = cut(np.array([0.0]), 0.2, 1)
    assert len(steps.length) == 0
    assert steps.output.tolist() == [0]


@pytest.mark.parametrize("staircase", [Staircase(2, 2.0), Staircase(3, 1.5, "tread", temperature=0.1), UNEVEN], ids=str)
def test_cell_averages_are_averages(staircase):
    edges = np.sort(np.random.default_rng(0).uniform(-3, 3, 12))
    fine = cells(staircase, edges)
    for k in range(len(edges) - 1):
        w = edges[k] + (edges[k + 1] - edges[k]) * (np.arange(20_000) + 0.5) / 20_000
        # a jump inside one of 20,000 points: at most range / 20,000
        assert fine.psi[k] == pytest.approx(staircase(w).mean(), abs=2e-4)
        assert fine.psi_squared[k] == pytest.approx((staircase(w) ** 2).mean(), abs=4e-4)
    # the antiderivative is continuous across thresholds
    t = staircase.thresholds
    np.testing.assert_allclose(integral(staircase, t + 1e-9), integral(staircase, t - 1e-9), atol=1e-8)


def test_the_lattice_continues_the_levels_with_the_outermost_steps():
    levels = lattice(UNEVEN, 4.0)
    assert set(UNEVEN.levels) <= set(levels)
    assert levels[0] <= -4
    assert levels[-1] >= 4
    np.testing.assert_allclose(np.diff(levels)[[0, -1]], [1.1, 0.5])


def test_rounding_variance_and_its_integral():
    levels = lattice(UNEVEN, 3.0)
    assert rounding_variance(levels, np.array([-0.55]))[0] == pytest.approx(0.35 * 0.35)
    np.testing.assert_allclose(rounding_variance(levels, UNEVEN.levels), 0, atol=1e-15)
    w, h = np.linspace(-2.7, 2.7, 41), 1e-5
    numeric = (rounding_variance_integral(levels, w + h) - rounding_variance_integral(levels, w - h)) / (2 * h)
    np.testing.assert_allclose(numeric, rounding_variance(levels, w), atol=1e-5)


def test_no_grid_is_finer_than_memory():
    p = Problem(Staircase(3, 1.5), lr=1e-6, initial_variance=0.0)
    assert len(mesh(p, p.weights, 1.0, scales(p, p.weights, 1.0), layers=2.0)) < 2 * MOST_CELLS


def test_time_is_not_cut_finer_than_memory():
    steps = cut(np.array([1.0, 1e18]), 0.1, 0)
    assert len(steps.length) < 2 * MOST_STEPS
    assert np.sum(steps.length[: steps.output[-1]]) == pytest.approx(1e17)


def test_a_lattice_of_more_cells_than_memory_is_refused():
    p = Problem(Staircase(2, 1e-6), method="lotion", initial_variance=1.0)
    with pytest.raises(ValueError, match="`weights` has a spacing"):
        mesh(p, p.weights, 1.0, scales(p, p.weights, 1.0), layers=4.0)
