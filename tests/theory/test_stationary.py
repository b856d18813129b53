"""Where training ends: reference rows, laws in paper notation, closed forms, and what has no end."""

import numpy as np
import pytest
from tests.reference.stationary import lotion, ste
from tests.theory.rows import ROWS

from stepwell.theory import Problem, Staircase, closure, exact, stationary
from stepwell.theory.stationary import _scan


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.fixed_exact])
def test_exact_fixed_points_of_the_rows(name):
    assert stationary(ROWS[name].problem).error == pytest.approx(ROWS[name].fixed_exact, abs=1e-4)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.fixed_closure])
def test_closure_fixed_points_of_the_rows(name):
    assert stationary(ROWS[name].problem, limit="closure").error == pytest.approx(ROWS[name].fixed_closure, abs=1e-4)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(Staircase(3, 1.8, "mid"), Staircase(3, 2.0), lr=0.7, label_noise=0.4, teacher_power=1.4),
        Problem(Staircase(4, 3.0, "tread"), lr=3.5, label_noise=0.1),
        Problem(Staircase(2, 2.0), lr=0.01),
        Problem(Staircase(8, 2.0), lr=0.3, label_noise=0.3),
        Problem(Staircase(3, 2.0, "levels", values=(-2.0, -0.8, -0.2, 0.2, 1.4, 2.0)), lr=0.4, label_noise=0.2),
    ],
    ids=lambda p: str(p.weights),
)
def test_hard_ste_has_the_piecewise_exponential_law(problem):
    p = problem
    want = ste(p.weights.levels, eta=p.lr, a=p.gain, rho=p.power, sigma=p.label_noise, R=p.teacher_power)
    assert stationary(p).error == pytest.approx(want, abs=1e-8)  # both are closed forms with a root found to 1e-12


@pytest.mark.parametrize(
    ("strength", "sigma", "grid"), [(1.0, 0.3, Staircase(3, 2.0)), (0.5, 0.4, Staircase(3, 1.5, "tread")), (2.0, 0.5, Staircase(4, 2.0))]
)
def test_lotion_has_its_law(strength, sigma, grid):
    rounded, latent, randomized = lotion(grid.spacing, grid.levels[0], grid, eta=0.1, strength=strength, sigma=sigma)
    end = stationary(Problem(grid, method="lotion", lr=0.1, label_noise=sigma, strength=strength))
    assert (end.error, end.error_latent, end.error_randomized) == tuple(pytest.approx(x, abs=2e-5) for x in (rounded, latent, randomized))


def test_lotion_with_decay_and_without_noise():
    grid = Staircase(3, 2.0)
    want = lotion(grid.spacing, grid.levels[0], grid, eta=0.2, strength=1.0, lam=0.3)
    end = stationary(Problem(grid, method="lotion", lr=0.2, weight_decay=0.3))
    assert (end.error, end.error_latent, end.error_randomized) == tuple(pytest.approx(x, abs=2e-5) for x in want)


@pytest.mark.parametrize(("grid", "method", "end"), [
    ("b3 2", "ste", (0.03061,)), ("b3 2", "lotion", (0.01023, 0.01548)), ("b3 2", "ptq", (0.01175,)),
    ("b3 1.5", "ste", (0.01287,)), ("b3 1.5", "lotion", (0.00261, 0.00727)), ("b3 1.5", "ptq", (0.00371,)),
    ("b4 2", "ste", (0.00702,)), ("b4 2", "lotion", (0.00409, 0.00671)), ("b4 2", "ptq", (0.00528,)),
])  # fmt: skip
def test_three_methods_side_by_side(grid, method, end):
    bits, omega = int(grid[1]), float(grid[3:])
    got = stationary(Problem(Staircase(bits, omega), method=method, lr=0.1, label_noise=0.3))
    assert (got.error, got.error_randomized)[: len(end)] == tuple(pytest.approx(x, abs=1e-5) for x in end)


@pytest.mark.parametrize("lr", [0.1, 1.0, 3.0])
def test_one_bit_ends_at_its_closed_form_whatever_the_learning_rate(lr):
    # psi^2 = omega^2 and E[psi] = 1, so 2 eps = 1 - 2 + omega^2
    assert stationary(Problem(Staircase(1, 1.3), lr=lr, label_noise=0.3)).error == pytest.approx((1.3**2 - 1) / 2, abs=1e-9)


@pytest.mark.parametrize(("omega", "lr", "sigma"), [(1.01, 1.9, 3.0), (1.0005, 0.5, 1.0), (1.000001, 0.1, 0.3)])
def test_one_bit_ends_there_just_inside_the_top_level_too(omega, lr, sigma):
    # the outer exponential is eta E / (2 (omega - tau)) long, up to 1e5 ranges here; masses lose 1e-16 / (omega - 1) at most
    assert stationary(Problem(Staircase(1, omega), lr=lr, label_noise=sigma)).error == pytest.approx((omega**2 - 1) / 2, rel=1e-9)


@pytest.mark.parametrize("problem", [
    Problem(Staircase(2, 1.01), lr=1.9, label_noise=3.0),
    Problem(Staircase(3, 2.0), lr=1000.0, label_noise=0.3),
    Problem(Staircase(3, 1.0001, "tread"), lr=10.0, label_noise=1.0),
], ids=lambda p: str(p.weights))  # fmt: skip
def test_hard_ste_has_its_law_where_the_tail_is_a_thousand_ranges_long(problem):
    p = problem
    want = ste(p.weights.levels, eta=p.lr, sigma=p.label_noise)
    assert stationary(p).error == pytest.approx(want, abs=1e-8)  # both are closed forms with a root found to 1e-12


def test_an_end_without_a_root_is_not_called_ok():
    found = _scan(lambda x: 1.0, -1.0, 1.0)  # noise makes more noise all the way up
    assert found.verdict("")[0] == "not converged"
    assert _scan(lambda x: np.nan, -1.0, 1.0).verdict("")[0] == "not converged"
    assert _scan(lambda x: -1.0, -1.0, 1.0) == (-1.0, 0, True)  # the noise dies out


def test_lotion_says_where_its_law_is_not_resolved():
    # U of strength 1 is linear between levels and lowest on the level next to the target, 6/7, where the weights end
    grid = Staircase(3, 2.0)
    end = stationary(Problem(grid, method="lotion", lr=1e-6))
    assert end.status == "stiff"
    assert "not resolved" in end.message
    for error in (end.error, end.error_latent, end.error_randomized):
        assert error == pytest.approx((1 - 6 / 7) ** 2 / 2, abs=1e-5)  # the cells are 1e-5 wide


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_ste_with_decay_ends_at_its_low_noise_limit(lr):
    # the drift 1 - psi - lam w turns at 2/3: it is 0 at w = 2/3, inside the cell of that level, so 2 eps = (1 - 2/3)^2
    end = stationary(Problem(Staircase(2, 2.0), lr=lr, weight_decay=0.5))
    assert (end.status, end.error) == ("ok", pytest.approx(1 / 18, abs=1e-7))


def test_lotion_beyond_strength_one_warns_of_its_wells():
    one, two = (stationary(Problem(Staircase(3, 2.0), method="lotion", lr=0.1, label_noise=0.5, strength=s)) for s in (1.0, 2.0))
    assert (one.status, one.message, two.status) == ("ok", "", "ok")
    assert "lattice point" in two.message


def test_one_bit_with_a_gaussian_teacher_ends_at_a_probability():
    # eps = P(|g| > 1); the midpoint rule on w* costs 1e-4 at most
    assert stationary(ROWS["P5"].problem).error == pytest.approx(0.3173105, abs=1e-4)


@pytest.mark.parametrize("name", ["P1", "P7", "P8", "P9", "b2 gauss decay", "b3 smooth"])
def test_late_dynamics_arrive_there(name):
    problem, late = {
        "P1": (ROWS["P1"].problem, 200.0),
        "P7": (ROWS["P7"].problem, 60.0),
        "P8": (ROWS["P8"].problem, 200.0),
        "P9": (ROWS["P9"].problem, 400.0),
        "b2 gauss decay": (Problem(Staircase(2, 1.5), lr=0.5, weight_decay=0.3, teacher="gauss", label_noise=0.4), 30.0),
        "b3 smooth": (Problem(Staircase(3, 2.0, temperature=0.2), lr=0.5, label_noise=0.3), 60.0),
    }[name]
    assert stationary(problem).error == pytest.approx(exact(problem, [late]).error[0], abs=5e-4)
    if problem.method == "ste":
        assert stationary(problem, limit="closure").error == pytest.approx(closure(problem, [late]).error[0], abs=1e-5)


def test_runaway_is_detected_and_its_error_known():
    for limit in ("exact", "closure"):
        end = stationary(ROWS["P6"].problem, limit=limit)
        assert end.status == "runaway"
        assert end.error == pytest.approx(0.33171, abs=1e-5)
    gauss = stationary(ROWS["P5"].problem, limit="closure")
    assert gauss.status == "runaway"
    # w becomes parallel to w*: 2 eps = 1 - 2 E|g| + 1; the closure still is at .2024 at t = 2000
    assert gauss.error == pytest.approx(1 - np.sqrt(2 / np.pi), abs=1e-9)
    assert gauss.error < closure(ROWS["P5"].problem, [2000.0]).error[0] < 0.2025


def test_runaway_weights_of_a_gaussian_teacher_do_not_need_an_endless_grid():
    # a smooth staircase has no closed law; a third of its weights leave the grid for good
    sharp = stationary(Problem(Staircase(1, 1.0, temperature=1e-4), lr=0.3, label_noise=0.2, teacher="gauss"))
    assert sharp.status == "ok"
    assert sharp.error == pytest.approx(stationary(ROWS["P5"].problem).error, abs=2e-3)  # 90 nodes and T / spread


def test_the_marginal_target_counts_as_runaway():
    end = stationary(Problem(Staircase(2, 1.0), lr=0.1))
    assert (end.status, end.error) == ("runaway", pytest.approx(0.0, abs=1e-12))


def test_lotion_beyond_the_linear_threshold_diverges_and_ste_does_not():
    assert stationary(Problem(Staircase(3, 2.0), method="lotion", lr=2.5)).status == "diverged"
    assert stationary(Problem(Staircase(3, 2.0), lr=2.5)).status == "ok"


def test_a_target_on_a_level_is_reached_without_error():
    for problem in (Problem(Staircase(3, 3.0, "tread"), lr=0.1), Problem(Staircase(3, 3.0, "tread"), method="lotion", lr=0.1)):
        assert stationary(problem).error == pytest.approx(0.0, abs=1e-6)
    assert stationary(Problem(Staircase(3, 3.0, "tread"), lr=0.1), limit="closure").error == pytest.approx(0.0, abs=1e-6)


def test_what_has_no_stationary_law_is_refused():
    with pytest.raises(ValueError, match="remember their path"):
        stationary(ROWS["P11"].problem)
    with pytest.raises(ValueError, match="got 'closure'"):
        stationary(ROWS["P9"].problem, limit="closure")
    with pytest.raises(ValueError, match="got 'both'"):
        stationary(ROWS["P1"].problem, limit="both")
