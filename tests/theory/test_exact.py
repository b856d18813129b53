"""The exact limit: reference rows, an explicit solver in paper notation, its own order of convergence, and what it must keep."""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.stats import norm
from tests.reference.fokker_planck import solve as explicit
from tests.theory.rows import LATENT, RANDOMIZED, ROWS

from stepwell.theory import Problem, Staircase, closure, exact, plateau, unquantized
from stepwell.theory import exact as exact_function
from stepwell.theory.exact import solve
from stepwell.theory.mesh import halved, mesh, scales

solver = sys.modules["stepwell.theory.exact"]
assert exact_function is exact


@pytest.mark.parametrize("name", ROWS)
def test_reference_rows(name):
    row = ROWS[name]
    curve = exact(row.problem, row.times)
    np.testing.assert_allclose(curve.error, row.exact, atol=row.tolerance)
    if name in LATENT:
        np.testing.assert_allclose(curve.error_latent, LATENT[name], atol=row.tolerance)
    if name in RANDOMIZED:
        np.testing.assert_allclose(curve.error_randomized, RANDOMIZED[name], atol=row.tolerance)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.l10_exact])
def test_plateau_lengths_of_the_rows(name):
    row = ROWS[name]
    curve = exact(row.problem, np.linspace(0, row.times[-1], 801 if row.problem.teacher == "one" else 401))
    # P5's tenth is passed within the first of 401 points: 0.256 against a grid of 0.05, so the linear interpolation costs a little
    assert plateau(curve).l10 == pytest.approx(row.l10_exact, rel=0.02 if name != "P5" else 0.04)


def sums(w, w_star, P, psi, a, rho):
    """-2 a m_psi + rho q_psi over the cells."""
    return np.sum(P * (rho * psi**2 - 2 * a * w_star[:, None] * psi))


def ste_by_hand(p, times, edges, w_star, mass):
    a, rho, lam, R, c = p.gain, p.power, p.weight_decay, p.teacher_power, p.clip_range
    w = (edges[1:] + edges[:-1]) / 2
    psi = p.weights(w)
    face = (p.weights(edges[1:-1] - 1e-9) + p.weights(edges[1:-1] + 1e-9)) / 2  # on a threshold the mean of both sides
    ends = p.weights(np.array([-c, c])) if np.isfinite(c) else np.zeros(2)

    def eps(w, w_star, P, lost):
        return (R + sums(w, w_star, P, psi, a, rho) + sums(w, w_star, lost, ends, a, rho)) / 2

    return explicit(
        lambda w, w_star: a * w_star - rho * face - lam * w, lambda *state: 2 * eps(*state) + p.label_noise**2, eps, times,
        eta=p.lr, rho=rho, w_star=w_star, mass=mass, edges=edges, m0=p.initial_overlap, v0=p.initial_variance, R=R,
        absorbing=bool(np.isfinite(c)),
    )  # fmt: skip


UNEVEN = Staircase(3, 2.0, "levels", values=(-2.0, -0.8, -0.2, 0.2, 1.4, 2.0))  # thresholds on multiples of 0.1
STE = {
    "mid, inputs, decay, R = 2": (
        Problem(
            Staircase(3, 1.6, "mid"), Staircase(3, 1.6), lr=0.5, label_noise=0.3, weight_decay=0.2, teacher_power=2.0, initial_overlap=-0.6
        ),
        (-7.0, 7.0, 700),
    ),
    "smooth": (Problem(Staircase(2, 1.5, temperature=0.2), lr=0.5, label_noise=0.3), (-6.0, 6.0, 600)),
    "uneven": (Problem(UNEVEN, lr=0.6, label_noise=0.2, initial_variance=0.3), (-5.0, 5.0, 800)),
    "clipped inside the grid": (
        Problem(Staircase(3, 1.4, "mid"), method="clipped_ste", lr=0.5, label_noise=0.3, clip=1.4),
        (-1.4, 1.4, 320),
    ),
}


@pytest.mark.parametrize("name", STE)
def test_other_settings_agree_with_explicit_steps_in_paper_notation(name):
    p, (low, high, cells) = STE[name]
    times = np.array([1.0, 3.0])
    two = [
        ste_by_hand(p, times, np.linspace(low, high, n + 1), np.array([np.sqrt(p.teacher_power)]), np.ones(1)) for n in (cells // 2, cells)
    ]
    want = (4 * two[1] - two[0]) / 3  # second order in h
    assert np.max(np.abs(two[1] - two[0])) < 3e-3
    np.testing.assert_allclose(exact(p, times).error, want, atol=2e-4)


def test_a_clip_range_below_the_top_level_freezes_weights_where_they_started():
    # at t = 0 nothing has moved: the error is that of the rounded start, most of it beyond the clip range
    p = Problem(Staircase(3, 2.0), method="clipped_ste", clip=0.3)
    assert exact(p, [0.0]).error[0] == pytest.approx(closure(Problem(Staircase(3, 2.0)), [0.0]).error[0], abs=1e-6)


@pytest.mark.slow
def test_a_gaussian_teacher_agrees_with_explicit_steps():
    p, times = Problem(Staircase(2, 1.5), lr=0.6, label_noise=0.3, teacher="gauss"), np.array([1.0, 4.0])
    w_star = (np.arange(120) + 0.5) * 5 / 120
    mass = norm.pdf(w_star) / norm.pdf(w_star).sum()
    two = [ste_by_hand(p, times, np.linspace(-12, 12, n + 1), w_star, mass) for n in (240, 480)]
    np.testing.assert_allclose(exact(p, times).error, (4 * two[1] - two[0]) / 3, atol=1e-3)


def test_lotion_agrees_with_explicit_steps_in_paper_notation():
    grid, strength, eta, sigma = Staircase(3, 1.5, "tread"), 0.6, 0.5, 0.3
    spacing, times = 0.5, np.array([1.0, 5.0])

    def drift(w, w_star):
        f = (w / spacing) % 1
        on_grid = np.minimum(f, 1 - f) < 1e-6
        return w_star - w - strength * np.where(on_grid, 0.0, spacing * (1 - 2 * f) / 2)

    def latent(w, w_star, P, lost):
        return (1 - 2 * np.sum(P * w) + np.sum(P * w**2)) / 2

    def errors(w, w_star, P, lost):
        f, r = (w / spacing) % 1, grid(w)
        rounded = (1 - 2 * np.sum(P * r) + np.sum(P * r**2)) / 2
        return rounded, latent(w, w_star, P, lost), latent(w, w_star, P, lost) + np.sum(P * spacing**2 * f * (1 - f)) / 2

    two = [
        explicit(
            drift, lambda *state: 2 * latent(*state) + sigma**2, errors, times, eta=eta, rho=1.0, w_star=np.ones(1), mass=np.ones(1),
            edges=np.linspace(-6, 6, n + 1),
        )
        for n in (240, 480)
    ]  # fmt: skip
    want = (4 * two[1] - two[0]) / 3
    curve = exact(Problem(grid, method="lotion", lr=eta, label_noise=sigma, strength=strength), times)
    np.testing.assert_allclose(np.stack([curve.error, curve.error_latent, curve.error_randomized], 1), want, atol=3e-4)


@pytest.mark.parametrize("name", ["P1", "P2", "P9", "P11"])
def test_the_scheme_is_second_order_in_grid_and_step(name):
    p, times = ROWS[name].problem, np.array([3.0, 8.0])
    edges = mesh(p, p.weights, 8.0, scales(p, p.weights, 8.0), layers=2.0)
    e = [solve(p, p.weights, times, edges, level).errors[0] for level in range(4)]
    steps = [np.max(np.abs(e[k + 1] - e[k])) for k in range(3)]
    assert np.log2(steps[0] / steps[1]) == pytest.approx(2, abs=0.25)
    assert np.log2(steps[1] / steps[2]) == pytest.approx(2, abs=0.15)


def test_the_step_alone_is_second_order(monkeypatch):
    p, times = ROWS["P1"].problem, np.array([3.0, 8.0])
    edges = mesh(p, p.weights, 8.0, scales(p, p.weights, 8.0), layers=2.0)
    monkeypatch.setattr(solver, "halved", lambda edges: edges)
    e = [solve(p, p.weights, times, edges, level).errors[0] for level in range(4)]
    assert np.log2(np.abs(e[1] - e[0]) / np.abs(e[2] - e[1])).min() > 1.7
    assert np.log2(np.abs(e[2] - e[1]) / np.abs(e[3] - e[2])).min() > 1.8


def test_extrapolation_is_an_order_better():
    p, times = ROWS["P2"].problem, np.array([3.0, 8.0, 15.0])
    edges = mesh(p, p.weights, 15.0, scales(p, p.weights, 15.0), layers=2.0)
    e = [solve(p, p.weights, times, edges, level).errors[0] for level in range(5)]
    true = (4 * e[4] - e[3]) / 3
    assert np.max(np.abs((4 * e[1] - e[0]) / 3 - true)) < 0.1 * np.max(np.abs(e[1] - true))


def test_density_is_normalised_positive_and_has_the_error_as_its_mean():
    p, times = ROWS["P1"].problem, [5.0, 20.0]
    curve = exact(p, times, density=True)
    law = curve.density
    width = np.diff(law.edges[0])
    np.testing.assert_allclose((law.p[:, 0] * width).sum(axis=1), 1.0, atol=1e-10)
    assert law.p.min() > -1e-9
    assert law.cdf(0)[0] == 0
    assert law.cdf(1)[-1] == pytest.approx(1, abs=1e-10)
    center = (law.edges[0][1:] + law.edges[0][:-1]) / 2
    psi = p.weights(center)
    by_hand = [(1 - 2 * p.gain * (P * width) @ psi + p.power * (P * width) @ psi**2) / 2 for P in law.p[:, 0]]
    np.testing.assert_allclose(curve.error, by_hand, atol=2e-3)  # the density is of the fine grid, the error extrapolated


def test_an_odd_problem_stays_odd():
    # a Gaussian teacher at w* and -w*: levels listed as uneven make the solver use both halves
    grid = Staircase(2, 1.5)
    both = Staircase(2, 1.5, "levels", values=tuple((grid.levels + np.array([0, 0, 0, 1e-9])).tolist()))
    curve = exact(Problem(both, lr=0.3, teacher="gauss"), [2.0], density=True)
    p, edges = curve.density.p[0], curve.density.edges[0]
    assert len(curve.density.teacher) == 2 * len(exact(Problem(grid, lr=0.3, teacher="gauss"), [2.0], density=True).density.teacher)
    np.testing.assert_allclose(edges, -edges[::-1], atol=1e-6)
    np.testing.assert_allclose(p, p[::-1, ::-1], atol=1e-5)
    assert curve.error[0] == pytest.approx(exact(Problem(grid, lr=0.3, teacher="gauss"), [2.0]).error[0], abs=1e-6)


def test_clipped_mass_is_absorbed_and_never_lost():
    law = exact(ROWS["P11"].problem, [0.0, 5.0, 20.0], density=True).density
    inside = (law.p[:, 0] * np.diff(law.edges[0])).sum(axis=1)
    atoms = law.atoms[:, 0]
    np.testing.assert_allclose(inside + atoms.sum(axis=1), 1.0, atol=1e-10)
    np.testing.assert_allclose(atoms[0], norm.cdf(-2.0), atol=1e-12)
    assert np.all(np.diff(atoms, axis=0) > 0)


def test_a_temperature_of_zero_is_the_limit():
    times = np.array([2.0, 10.0])
    hard = exact(Problem(Staircase(2, 2.0), lr=0.3, label_noise=0.3), times).error
    smooth = [exact(Problem(Staircase(2, 2.0, temperature=T), lr=0.3, label_noise=0.3), times).error for T in (1e-3, 1e-4)]
    # E[psi_T^2] - E[psi^2] is linear in T, and so is the gap
    np.testing.assert_allclose((smooth[0] - hard) / (smooth[1] - hard), 10, rtol=0.05)
    assert np.max(np.abs(smooth[1] - hard)) < 2e-4


def test_a_fine_wide_grid_is_no_grid():
    times = np.linspace(0, 20, 9)
    quantized = exact(Problem(Staircase(12, 8.0), lr=0.2, label_noise=0.5), times).error
    # the solver is not exact for linear drift; 1e-3 is its tolerance, this is what it does
    np.testing.assert_allclose(quantized, unquantized(Problem(None, lr=0.2, label_noise=0.5), times).error, atol=1e-4)


def test_without_quantizer_lotion_of_strength_zero_is_unquantized_training():
    times = np.linspace(0, 20, 9)
    curve = exact(Problem(Staircase(3, 2.0), method="lotion", strength=0.0, lr=0.2, label_noise=0.5), times)
    np.testing.assert_allclose(curve.error_latent, unquantized(Problem(None, lr=0.2, label_noise=0.5), times).error, atol=1e-4)


def test_lotion_is_the_drift_of_ste_on_the_dual_lattice():
    # at equal noise: E of LOTION is made large and constant by label noise, so both weights move by the same equation
    sigma, times = 30.0, np.array([0.5, 2.0])
    lotion = exact(Problem(Staircase(4, 30.0, "end"), method="lotion", lr=0.02, label_noise=sigma), times, density=True)
    dual = exact(
        Problem(Staircase(5, 32.0, "levels", values=tuple(np.arange(-28.0, 28.1, 4.0))), lr=0.02, label_noise=sigma),
        times,
        density=True,
    )
    mean = [
        np.sum(c.density.p[:, 0] * np.diff(c.density.edges[0]) * (c.density.edges[0][1:] + c.density.edges[0][:-1]) / 2, axis=1)
        for c in (lotion, dual)
    ]
    np.testing.assert_allclose(mean[0], mean[1], atol=2e-3)


def test_without_numba_the_numbers_are_the_same(monkeypatch):
    row = ROWS["P2"]
    fast = exact(row.problem, row.times).error
    monkeypatch.setitem(sys.modules, "stepwell.theory.compiled", None)
    np.testing.assert_allclose(exact(row.problem, row.times).error, fast, atol=1e-6)  # the grid follows the closure's estimate


def test_statuses():
    assert exact(ROWS["P1"].problem, [1.0]).status == "ok"
    assert exact(ROWS["P6"].problem, [1.0]).status == "runaway"
    assert exact(ROWS["P7"].problem, [1.0]).status == "ok"
    diverging = exact(Problem(Staircase(3, 2.0), method="lotion", lr=2.3, label_noise=0.1), [0.0, 2.0, 200.0])
    assert diverging.status == "diverged"
    assert np.isinf(diverging.error[-1])
    assert not np.any(np.isnan(diverging.error))


def test_a_grid_that_cannot_be_refined_says_so(monkeypatch):
    monkeypatch.setattr(solver, "WORK", 1.0)
    monkeypatch.setattr(solver, "mesh", partial(mesh_of_width, 0.5))
    curve = exact(ROWS["P4"].problem, [5.0, 10.0])
    assert curve.status == "stiff"
    assert "thinner than the finest grid" in curve.message


def mesh_of_width(width, problem, weights, horizon, scale, *, layers, finest=0.0):
    return weights.thresholds[0] + width * np.arange(-20, 21)


def test_halving_is_what_the_convergence_test_assumes():
    np.testing.assert_array_equal(halved(np.array([0.0, 2.0])), [0, 1, 2])


@pytest.mark.parametrize("times", [[1.0, 0.5], [-1.0], [np.nan]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="`times`"):
        exact(ROWS["P1"].problem, times)


def test_sticky_ends_are_refused():
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0 .* got 0\.1.*`simulate`"):
        exact(Problem(Staircase(2, 2.0), method="clipped_ste", weight_decay=0.1), [1.0])


def test_a_density_beyond_memory_is_refused():
    with pytest.raises(ValueError, match="fewer `times`"):
        exact(Problem(Staircase(8, 2.0), teacher="gauss"), np.linspace(0, 10, 10_000), density=True)


def test_a_perfect_student_is_solved_in_little_memory():
    # w* = 1 is a level and w starts at 1 +- 0.1, ten sigmas inside its step: the error is 0 and stays 0
    p = Problem(Staircase(2, 3.0), lr=0.2, initial_overlap=1.0, initial_variance=0.01)
    scale = scales(p, p.weights, 1.0)
    assert len(mesh(p, p.weights, 1.0, scale, layers=2.0)) < 1e5
    curve = exact(p, [0.0, 1.0])
    assert curve.status == "ok"
    np.testing.assert_allclose(curve.error, 0.0, atol=1e-9)


def test_a_gaussian_teacher_with_a_start_without_width_has_the_error_of_rounding_at_first():
    # w = -2 w*: the nodes alone pass the thresholds one at a time and miss the closed form by 0.04
    p = Problem(
        Staircase(2, 3.0, "tread"), lr=0.2, label_noise=0.3, teacher="gauss", teacher_power=0.4, initial_overlap=-0.8, initial_variance=0.0
    )
    assert exact(p, [0.0]).error[0] == pytest.approx(closure(p, [0.0]).error[0], abs=1e-3)


def test_a_start_without_width_does_not_move_to_the_centre_of_a_cell():
    # LOTION of strength 0 trains in float: its rounded error is that of PTQ, a closed form
    p = Problem(Staircase(2, 4.0, "mid"), method="lotion", strength=0.0, lr=0.7, label_noise=1.0, initial_overlap=0.5, initial_variance=0.0)
    times = np.linspace(0, 3, 31)
    want = exact(replace(p, method="ptq"), times).error
    np.testing.assert_allclose(exact(p, times).error, want, atol=1e-3)


def test_a_wrong_start_says_so(monkeypatch):
    monkeypatch.setattr(solver, "TEACHER_NODES", 2)
    curve = exact(Problem(Staircase(2, 3.0), lr=0.2, teacher="gauss", initial_overlap=-2.0, initial_variance=0.0), [1.0])
    assert curve.status == "stiff"
    assert "t = 0" in curve.message


def test_clipped_weights_that_all_start_at_zero_are_inside():
    # psi(0) is 0 for a mid-tread grid, so the error is that of a zero student, R / 2
    p = Problem(Staircase(2, 2.0, "tread"), method="clipped_ste", lr=0.3, initial_variance=0.0)
    assert exact(p, [0.0]).error[0] == pytest.approx(0.5, abs=1e-9)
