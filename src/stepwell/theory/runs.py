"""Simulated runs, one per seed: how they start, walk through time, and are measured. Needs numba.

Symbols: d = dim, w* = teacher, z = standard normal part of the start, psi(w) = rounded weights, a and rho = input coefficients.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from threading import Event
from typing import Literal, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from stepwell.theory.kernels import METHODS, Grid, Rule, State, advance, grid_of, new_state, round_into
from stepwell.theory.problem import Problem
from stepwell.theory.staircase import Array

Start = Literal["quantile", "iid"]
Result = TypeVar("Result")

WORK_PER_CALL = 10**8  # coordinate-steps, about 0.1 s, after which a run looks whether it shall stop
HUGE = 1e12  # an error this far above the scale of the start has diverged


class Runs(NamedTuple):
    """Which runs: `seeds` of them, the k-th one being the same whatever their number is."""

    problem: Problem
    dim: int
    seeds: int
    seed: int
    start: Start
    batch: int


class Run(NamedTuple):
    """One seed."""

    problem: Problem
    state: State
    weights: Grid
    inputs: Grid
    rule: Rule
    stop: Event


def for_each_run(runs: Runs, task: Callable[[Run], Result]) -> list[Result]:
    """Return the task's result for every run, one run per thread: the compiled loops release the interpreter lock."""
    stop = Event()
    every = [new_run(runs, k, stop) for k in range(runs.seeds)]
    with ThreadPoolExecutor(min(runs.seeds, numba.get_num_threads())) as pool:
        try:
            return list(pool.map(task, every))
        except BaseException:
            stop.set()  # otherwise leaving the pool would wait until all runs have ended
            raise


def walk(run: Run, stops: NDArray[np.int64]) -> Iterator[None]:
    """Train, and yield at every stop; stops are given in steps."""
    chunk = max(1, WORK_PER_CALL // (run.state.weight.size * run.rule.batch))
    done = 0
    for goal in stops.tolist():
        while done < goal and not run.stop.is_set():
            steps = min(chunk, goal - done)
            advance(run.state, steps, run.weights, run.inputs, run.rule)
            done += steps
        yield


def curve(run: Run, stops: NDArray[np.int64]) -> Array:
    """Return the errors at the stops, `(stops, 3)` as in `errors`; infinite from the stop on where a run has diverged."""
    p, rows = run.problem, np.full((len(stops), 3), np.inf)
    bound = HUGE * (p.teacher_power + p.initial_variance + p.initial_overlap**2 / p.teacher_power)
    with np.errstate(over="ignore", invalid="ignore"):
        for k, _ in enumerate(walk(run, stops)):
            row = errors(run)
            if not np.all(row < bound):  # NaN is not below it either
                break
            rows[k] = row
    return rows


def errors(run: Run) -> Array:
    """Return the error of the rounded, the latent and the randomly rounded weights, `(3,)`, from overlaps in float64."""
    p, weight = run.problem, run.state.weight.astype(np.float64)
    teacher = run.state.target.astype(np.float64)
    rounded = np.empty_like(run.state.forward)
    round_into(run.weights, run.state.weight, rounded)

    def error(w: Array) -> float:
        return float(np.mean(teacher * teacher - 2 * p.gain * w * teacher + p.power * w * w)) / 2

    latent = error(weight)
    spread = rounding_variance(p.weights.levels, weight) if p.weights and p.method == "lotion" else np.zeros(1)
    return np.array([error(rounded.astype(np.float64)), latent, latent + p.power / 2 * float(np.mean(spread))])


def rounding_variance(levels: Array, weight: Array) -> Array:
    """Return (w - lower)(upper - w), elementwise, on the levels, continued beyond their ends with the outermost steps."""
    k = np.clip(np.searchsorted(levels, weight), 1, len(levels) - 1)
    step = levels[k] - levels[k - 1]
    position = (weight - levels[k - 1]) / step
    fraction = position - np.floor(position)
    return np.asarray(step**2 * fraction * (1 - fraction))


def new_run(runs: Runs, number: int, stop: Event) -> Run:
    """Return run `number` before its first step."""
    p, d = runs.problem, runs.dim
    for_start, for_samples = np.random.SeedSequence(runs.seed, spawn_key=(number,)).spawn(2)
    weight, teacher = initial(p, d, generator=np.random.default_rng(for_start), start=runs.start)
    weights = grid_of(p.weights)
    rule = Rule(
        method=METHODS[p.method],
        root_dim=sqrt(d),
        noise=float(p.label_noise),
        rate=p.lr / (runs.batch * sqrt(d)),
        decay=p.lr * p.weight_decay / d,
        clip=float(p.clip_range),
        pull=p.lr * p.strength * p.power / (2 * d),
        batch=runs.batch,
    )
    # One step of decay can be smaller than the resolution of float32.
    state = new_state(weight, teacher, samples=for_samples, dtype=np.float64 if p.weight_decay > 0 else np.float32)
    round_into(weights if p.method in ("ste", "clipped_ste") else grid_of(None), state.weight, state.forward)
    return Run(p, state, weights, grid_of(p.inputs), rule, stop)


def initial(problem: Problem, dim: int, *, generator: np.random.Generator, start: Start) -> tuple[Array, Array]:
    """Return the weights before the first step and the teacher, `(d,)` each.

    "quantile" takes the normal quantiles in random order for z and a Gaussian teacher, and makes z orthogonal to the teacher.
    """
    R = problem.teacher_power
    if start == "quantile":
        quantiles = ndtri((np.arange(dim) + 0.5) / dim)
        z, g = generator.permutation(quantiles), generator.permutation(quantiles)
    else:
        z, g = generator.standard_normal((2, dim))
    teacher = sqrt(R) * (np.ones(dim) if problem.teacher == "one" else g)
    if start == "quantile":
        z = z - teacher * ((z @ teacher) / (teacher @ teacher))
    return problem.initial_overlap / R * teacher + sqrt(problem.initial_variance) * z, teacher
