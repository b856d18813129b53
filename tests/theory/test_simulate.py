"""The compiled simulator against plain NumPy, sample by sample; its arguments and its failures."""

import sys
from math import sqrt

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from tests.reference.simulate import Model, coefficients, generalization_error, lattice, neighbours, sgd, staircase

from stepwell.theory.problem import Problem
from stepwell.theory.simulate import simulate, simulate_weights
from stepwell.theory.staircase import Staircase

numba = pytest.importorskip("numba")

from stepwell.theory import runs  # noqa: E402
from stepwell.theory.kernels import grid_of, round_into  # noqa: E402
from stepwell.theory.normal import aligned, fill_normal  # noqa: E402

BOTH = Staircase(bits=2, range=2.0)
UNEVEN = Staircase(bits=3, range=3.0, kind="levels", values=(-3.0, -1.0, -0.4, 0.3, 0.8, 1.1, 2.0))
UNEVEN_INPUTS = Staircase(bits=2, range=2.0, kind="levels", values=(-2.0, -0.5, 0.5, 2.0))

CASES = {
    "ste": Problem(BOTH, BOTH, lr=0.2, label_noise=0.3),
    "fine": Problem(Staircase(8, 1.5, "tread"), Staircase(4, 2.0, "mid"), lr=0.4),
    "unquantized": Problem(None, BOTH, lr=0.3, label_noise=0.2),
    "decay": Problem(BOTH, BOTH, lr=0.2, weight_decay=0.7, teacher="gauss", teacher_power=2.0, initial_overlap=0.5),
    "clipped": Problem(BOTH, BOTH, "clipped_ste", lr=0.4, label_noise=0.3, clip=1.2),
    "sticky": Problem(BOTH, None, "clipped_ste", lr=0.4, label_noise=0.3, weight_decay=1.0),
    "lotion": Problem(Staircase(3, 2.0), BOTH, "lotion", lr=0.3, strength=0.8, label_noise=0.1),
    "lotion decay": Problem(Staircase(3, 2.0, "tread"), None, "lotion", lr=0.3, strength=3.0, weight_decay=0.5),
    "lotion uneven": Problem(UNEVEN, BOTH, "lotion", lr=0.3, label_noise=0.5),
    "ptq": Problem(BOTH, None, "ptq", lr=0.3, label_noise=0.2, teacher="gauss"),
    "uneven": Problem(UNEVEN, UNEVEN_INPUTS, lr=0.2, label_noise=0.1),
    "smeared": Problem(Staircase(2, 2.0, temperature=0.3), BOTH, lr=0.3, label_noise=0.1),
}


def model_of(p: Problem) -> Model:
    """Return the reference model: its own rounding, its own coefficients."""
    a, rho = coefficients(p.inputs.levels) if p.inputs else (1.0, 1.0)
    phi = staircase(p.inputs.levels) if p.inputs else lambda v: v
    psi = staircase(p.weights.levels, p.weights.temperature) if p.weights else lambda v: v
    return Model(
        psi, phi, p.method, p.lr, p.label_noise, p.weight_decay,
        c=np.inf if p.weights is None else p.weights.range if p.clip is None else p.clip, strength=p.strength,
        lattice=lattice(np.array([0.0, 1.0]) if p.weights is None else p.weights.levels),
        a=a, rho=rho,
    )  # fmt: skip


def distances(p: Problem, batch: int, *, seed: int) -> np.ndarray:
    """Return the largest deviation from the reference on the same noise: of a weight, and of the three errors."""
    d, steps = 80, 150
    run = runs.new_run(runs.Runs(p, d, 1, seed, "iid", batch), 0, runs.Event())
    stream, noise = run.state.stream.copy(), np.empty((steps, batch, len(run.state.normal)))
    bits, buffer = aligned(noise.shape[-1], np.uint32), aligned(noise.shape[-1], np.float32)
    for row in noise.reshape(-1, noise.shape[-1]):
        fill_normal(stream, bits, buffer)
        row[:] = buffer
    model, target = model_of(p), run.state.target.astype(float)
    path = sgd(model, run.state.weight.astype(float), target, noise[..., :d], noise[..., -1])
    assert np.max(np.abs(path[-1] - path[0])) > 0.1  # something happens
    rows, stops = [], np.array([0, 1, 7, 60, steps])
    for stop, _ in zip(stops, runs.walk(run, stops), strict=True):
        w = path[stop]
        lower, upper = neighbours(model.lattice, w)
        expected = [generalization_error(model, v, target) for v in (model.psi(w), w, w)]
        expected[2] += model.rho / 2 * np.mean((w - lower) * (upper - w)) if p.method == "lotion" else 0.0
        rows.append([np.max(np.abs(run.state.weight - w)), *np.abs(runs.errors(run) - expected)])
    return np.max(rows, axis=0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_same_noise_gives_the_path_of_the_reference(name, batch):
    # float32 rounds each of 150 updates to 6e-8 of a weight of order 1 and each error signal to about 1e-6. Once in some 50 runs a
    # number lies so close to a threshold that the two fall on different sides, and then differ by a step of training or two: of three
    # runs one may.
    found = np.sort([distances(CASES[name], batch, seed=seed) for seed in range(3)], axis=0)
    assert np.all(found[1] < 1e-5), found
    assert np.all(found[2] < 0.05), found


def test_independent_noise_gives_the_reference_in_the_mean():
    p, d, seeds, steps = CASES["ste"], 60, 40, 300
    model, generator = model_of(p), np.random.default_rng(1)
    curves = []
    for _ in range(seeds):
        w, x, xi = generator.standard_normal(d), generator.standard_normal((steps, 1, d)), generator.standard_normal((steps, 1))
        path = sgd(model, w, np.ones(d), x, xi)
        curves.append([generalization_error(model, model.psi(path[k]), np.ones(d)) for k in (0, 60, 150, 300)])
    ours = simulate(p, [0, 1, 2.5, 5], dim=d, seeds=400, start="iid")
    spread = np.hypot(np.std(curves, axis=0, ddof=1) / sqrt(seeds), ours.stderr)
    assert np.all(np.abs(np.mean(curves, axis=0) - ours.error) < 4 * spread)


@pytest.mark.parametrize(
    "staircase",
    [BOTH, Staircase(1, 0.7, "mid"), Staircase(5, 3.0, "tread"), Staircase(16, 2.0), UNEVEN, Staircase(3, 1.0, temperature=0.2)],
    ids=str,
)
def test_compiled_rounding_is_the_staircase(staircase):
    values = np.linspace(-4, 4, 20011, dtype=np.float32)
    # float32 cannot tell on which side of a threshold a value lies that is closer than its own resolution
    values = values[np.min(np.abs(values[:, None] - staircase.thresholds[:: max(1, len(staircase.thresholds) // 64)]), axis=1) > 1e-6]
    rounded = np.empty_like(values)
    round_into(grid_of(staircase), values, rounded)
    wrong = np.abs(rounded - staircase(values)) > 3e-7 * staircase.range
    assert np.count_nonzero(wrong) <= (0 if len(staircase.levels) < 1000 else 200)  # 16 bits: steps of 6e-5, values known to 2e-7
    assert np.max(np.abs(rounded - staircase(values))) <= np.max(staircase.steps) * 1.01


@pytest.mark.parametrize("batch", [1, 4])
def test_batch_divides_the_diffusion(batch):
    p = Problem(None, BOTH, lr=0.8, label_noise=0.5)
    a, rho, eta, times = p.gain, p.power, p.lr, np.linspace(0, 8, 17)

    def flow(_: float, state: np.ndarray) -> list[float]:
        m, q = state
        E = 1 + p.label_noise**2 - 2 * a * m + rho * q
        return [eta * (a - rho * m), 2 * eta * (a * m - rho * q) + eta**2 * rho * E / batch]

    m, q = solve_ivp(flow, (0, 8), [0, 1], t_eval=times, rtol=1e-9, atol=1e-9).y
    expected = (1 - 2 * a * m + rho * q) / 2
    ours = simulate(p, times, dim=1000, seeds=16, batch=batch)
    assert np.max(np.abs(ours.error - expected)) < 4 / sqrt(1000 * 16) + 2 / 1000  # noise d^(-1/2) over 16 seeds, bias 1/d
    assert abs(ours.error[-1] - expected[-1]) < 5 * ours.stderr[-1] + 1e-3


def test_frozen_weights_stay_where_they_are():
    p = Problem(BOTH, None, "clipped_ste", lr=0.3, label_noise=0.3, clip=1.0)
    start, end = simulate_weights(p, [0, 5], dim=500).weights[:, 0]
    outside = np.abs(start) > 1.0
    assert np.array_equal(start[outside], end[outside])
    assert np.all(start[~outside] != end[~outside])


def test_decay_makes_the_clip_range_sticky():
    # Decay pulls a frozen weight back to the range, where the gradient throws it out again: a mass of order one sits within a
    # few steps' length of the end, although the range is open.
    p = Problem(BOTH, None, "clipped_ste", lr=0.2, label_noise=0.3, weight_decay=0.1, clip=0.9)
    weights = simulate_weights(p, [60], dim=1000, seeds=2).weights[0].ravel()
    assert np.mean((weights > 0.9) & (weights < 1.0)) > 0.3
    assert np.mean(weights > 1.05) < 0.05


def test_quantile_start_has_no_sampling_noise():
    p = Problem(BOTH, teacher="gauss", initial_overlap=0.3, teacher_power=1.5)
    quantile = simulate_weights(p, [0], dim=1000, seeds=3)
    assert np.ptp(np.mean(quantile.weights[0] ** 2, axis=1)) < 6 / 1000  # making z orthogonal takes chi^2 / d away
    overlap = np.mean(quantile.weights[0] * quantile.teacher, axis=1)
    assert np.allclose(overlap, 0.3, atol=0.002)  # the d quantiles have variance 1 - O(1/d)
    iid = simulate_weights(p, [0], dim=1000, seeds=3, start="iid")
    assert np.ptp(np.mean(iid.weights[0] ** 2, axis=1)) > 0.02  # sqrt(2 / d) = 0.045 per seed
    assert not np.array_equal(quantile.weights[0, 0], quantile.weights[0, 1])


def test_runs_depend_on_the_seed_and_their_number_only():
    p = CASES["ste"]
    three = simulate_weights(p, [0, 1], dim=200, seeds=3, seed=7)
    assert np.array_equal(three.weights[:, :2], simulate_weights(p, [1e-9, 0.5, 1], dim=200, seeds=2, seed=7).weights[[0, 2]])
    assert not np.array_equal(three.weights, simulate_weights(p, [0, 1], dim=200, seeds=3, seed=8).weights)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    one_thread = simulate(p, [0, 1], dim=200, seeds=3, seed=7)
    numba.set_num_threads(before)
    both = simulate(p, [0, 1], dim=200, seeds=3, seed=7)
    assert np.array_equal(one_thread.error, both.error)
    single = simulate(p, [0, 1], dim=200, seeds=1, seed=7)
    assert single.stderr is None
    assert "One seed" in single.message


def test_divergence_has_a_status_and_no_nan():
    p = Problem(BOTH, method="ptq", lr=2.5, label_noise=0.3)
    trajectory = simulate(p, [0, 1, 5, 40, 100], dim=200, seeds=2)
    assert trajectory.status == "diverged"
    assert np.all(np.isfinite(trajectory.error[:3]))
    assert np.all(np.isinf(trajectory.error[3:]))
    assert not np.any(np.isnan(trajectory.stderr))
    assert "t = 40" in trajectory.message
    assert simulate(Problem(BOTH, lr=2.5, label_noise=0.3), [0, 40], dim=200, seeds=2).status == "ok"  # quantization confines it


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lotion_diverges_where_the_linear_model_does(decay):
    p = Problem(BOTH, method="lotion", lr=2.5, label_noise=0.3, weight_decay=decay)
    trajectory = simulate(p, [0, 2, 400], dim=100, seeds=2)
    assert trajectory.status == "diverged"
    assert np.all(np.isinf([trajectory.error[2], trajectory.error_latent[2], trajectory.error_randomized[2]]))
    assert np.all(np.isfinite(trajectory.error_randomized[:2]))


def test_a_large_start_is_no_divergence():
    p = Problem(None, lr=0.5, initial_variance=1e14)
    assert simulate(p, [0, 1], dim=100, seeds=2).status == "ok"


def test_a_failing_run_stops_the_others():
    ages = np.array([10**15])  # steps; would take years

    def task(run: runs.Run) -> None:
        if run.state.stream[0, 0] == first:
            raise RuntimeError("stop here")
        list(runs.walk(run, ages))

    everything = runs.Runs(CASES["ste"], 100, 3, 0, "quantile", 1)
    first = runs.new_run(everything, 0, runs.Event()).state.stream[0, 0]
    with pytest.raises(RuntimeError, match="stop here"):
        runs.for_each_run(everything, task)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 1}, ["`dim`", "from 2", "got 1"]),
        ({"dim": 10.5}, ["`dim`", "integer", "10.5"]),
        ({"dim": True}, ["`dim`", "True"]),
        ({"seeds": 0}, ["`seeds`", "from 1", "got 0"]),
        ({"seed": -1}, ["`seed`", "from 0", "got -1"]),
        ({"batch": 0}, ["`batch`", "from 1", "got 0"]),
        ({"start": "cold"}, ["`start`", "'quantile'", "'cold'"]),
        ({"dim": 10**7, "seeds": 50}, ["GiB", "dim=10000000", "seeds=50", "33.5"]),
        ({"times": [0, 1, 1]}, ["`times`", "increasing"]),
        ({"times": [0, float("nan")]}, ["`times`", "finite"]),
        ({"times": [0, 1e15]}, ["`times`", "steps", "1e+15"]),
    ],
)
def test_bad_values_are_refused_with_their_range(arguments, words):
    with pytest.raises(ValueError, match="`") as refusal:
        simulate(CASES["ste"], **{"times": [0, 1], **arguments})
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_many_snapshots_count_as_memory():
    with pytest.raises(ValueError, match="GiB"):
        simulate_weights(CASES["ste"], np.arange(1000), dim=10**6)


def test_missing_numba_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"stepwell\[fast\]"):
        simulate(CASES["ste"], [0, 1])
