"""Simulation: online SGD at finite dimension, the experiment that the solvers of this package predict.

Every step draws a fresh Gaussian sample (a fresh batch), so nothing is used twice; time is step / d. The error is computed from the
overlaps of the weights, eps_g = (w*.w* - 2 a psi(w).w* + rho psi(w).psi(w)) / 2d, which is exact for Gaussian inputs: a test set
would add noise larger than the deviation from the infinite-dimensional limit, which falls as d^(-1/2).

The loops are compiled by numba (`pip install stepwell[fast]`) and run one seed per thread. Weights are float32, with weight decay float64.

Source: arXiv:2510.10693 for the model.
"""

from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepwell.theory.problem import Problem, check_times
from stepwell.theory.staircase import Array
from stepwell.theory.trajectory import Trajectory

Start = Literal["quantile", "iid"]

MAX_BYTES = 2**31
BYTES_PER_WEIGHT = 72  # of one seed: arrays of 4 or 8 bytes per weight, and float64 scratch for the start and the overlaps
MAX_STEPS = 2.0**53
MAX_DIM, MAX_SEEDS, MAX_BATCH = 10**8, 10**6, 10**6


class Sample(NamedTuple):
    """Weights of simulated runs.

    Attributes:
        weights: latent weights, `(times, seeds, dim)`.
        teacher: teacher weights, `(seeds, dim)`.
    """

    weights: NDArray[np.float32]
    teacher: NDArray[np.float32]


def simulate(
    problem: Problem, times: ArrayLike, *, dim: int = 1000, seeds: int = 4, seed: int = 0, start: Start = "quantile", batch: int = 1
) -> Trajectory:
    """Train at finite dimension and return the mean learning curve over seeds.

    Args:
        problem: any method, teacher and staircase.
        times: output times >= 0, strictly increasing, `(times,)`; each is rounded to a whole step, step = time * dim.
        dim: number of weights d >= 2.
        seeds: number of independent runs.
        seed: chooses the runs; run k is the same whatever `seeds` is.
        start: "quantile" gives the initial weights exactly the quantiles of their law, in random order, which removes the noise of
            the start; "iid" draws them.
        batch: samples per step; B samples divide the diffusion of the weights by B.

    Returns:
        The mean over seeds with its standard error (None for one seed). LOTION adds the latent and the randomized error, PTQ the
        latent one. Status "diverged": a run left every bound, and the error is infinite from there on.

    Raises:
        ValueError: a value outside its range, or runs that need more than 2 GiB of memory.
        ImportError: numba is missing.

    >>> from stepwell.theory.staircase import Staircase
    >>> p = Problem(Staircase(bits=1, range=2.0), lr=0.1, initial_overlap=1.0, initial_variance=0.0)
    >>> float(simulate(p, [0.0], dim=100).error[0])  # w = w* = 1 is rounded to 2, and half the squared distance is
    0.5
    """
    t = check_times(times)
    _check(problem, t, dim=dim, seeds=seeds, seed=seed, start=start, batch=batch, copies=0)
    _need_numba()
    from stepwell.theory.runs import Runs, curve, for_each_run

    stops = np.rint(t * dim).astype(np.int64)
    curves = for_each_run(Runs(problem, dim, seeds, seed, start, batch), lambda run: curve(run, stops))
    return _mean(problem, t, np.array(curves))


def simulate_weights(
    problem: Problem, times: ArrayLike, *, dim: int = 1000, seeds: int = 1, seed: int = 0, start: Start = "quantile", batch: int = 1
) -> Sample:
    """Train at finite dimension and return the latent weights at the given times, for histograms.

    Args:
        problem: as in `simulate`, and so are all other arguments; equal arguments give equal runs.
        times: output times, `(times,)`.
        dim: number of weights.
        seeds: number of independent runs.
        seed: chooses the runs.
        start: "quantile" or "iid".
        batch: samples per step.

    Returns:
        Weights and teachers. Weights of a run that diverged are infinite or NaN, as training leaves them.

    Raises:
        ValueError: a value outside its range, or runs and results that need more than 2 GiB of memory.
        ImportError: numba is missing.
    """
    t = check_times(times)
    _check(problem, t, dim=dim, seeds=seeds, seed=seed, start=start, batch=batch, copies=len(t))
    _need_numba()
    from stepwell.theory.runs import Run, Runs, for_each_run, walk

    stops = np.rint(t * dim).astype(np.int64)

    def snapshots(run: Run) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            return np.array([run.state.target, *(run.state.weight.astype(np.float32) for _ in walk(run, stops))])

    rows = np.stack(for_each_run(Runs(problem, dim, seeds, seed, start, batch), snapshots), axis=1)
    return Sample(rows[1:], rows[0])


def _check(problem: Problem, t: Array, *, dim: int, seeds: int, seed: int, start: str, batch: int, copies: int) -> None:
    """Refuse bad values, showing them with their range; `copies` float32 weights are kept per run."""
    for name, value, least, most in (
        ("dim", dim, 2, MAX_DIM),
        ("seeds", seeds, 1, MAX_SEEDS),
        ("seed", seed, 0, 2**63),
        ("batch", batch, 1, MAX_BATCH),
    ):
        if not _is_integer(value) or not least <= value <= most:
            raise ValueError(f"`{name}` must be an integer from {least} to {most}: got {value!r}.")
    if start not in ("quantile", "iid"):
        raise ValueError(f"`start` must be 'quantile' or 'iid': got {start!r}.")
    if t[-1] * dim > MAX_STEPS:
        raise ValueError(f"`times` x `dim` must be at most {MAX_STEPS:.0e} steps: got {t[-1]:g} x {dim}.")
    needed = dim * seeds * (BYTES_PER_WEIGHT + 8 * copies)
    if needed > MAX_BYTES:
        raise ValueError(
            f"`dim` x `seeds` must fit into {MAX_BYTES / 2**30:g} GiB: got dim={dim} and seeds={seeds}, which need "
            f"{needed / 2**30:.3g} GiB. The largest product is {MAX_BYTES * dim * seeds // needed:.3g} here."
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _need_numba() -> None:
    try:
        import numba  # noqa: F401
    except ImportError as missing:
        raise ImportError("A simulation needs numba, which is not installed. Install it with `pip install stepwell[fast]`.") from missing


def _mean(problem: Problem, t: Array, curves: Array) -> Trajectory:
    """Return the record of `curves`, `(seeds, times, 3)`: error, latent error, randomized error."""
    error, latent, randomized = curves.mean(axis=0).T
    finite = np.isfinite(error)
    messages = [] if np.all(finite) else [f"The error left every bound before t = {t[np.argmin(finite)]:g}."]
    stderr = None
    if len(curves) > 1:
        stderr = np.full(len(t), np.inf)
        stderr[finite] = curves[:, finite, 0].std(axis=0, ddof=1) / sqrt(len(curves))
    else:
        messages.append("One seed: no standard error.")
    return Trajectory(
        t,
        error,
        "ok" if np.all(finite) else "diverged",
        " ".join(messages),
        error_latent=latent if problem.method in ("lotion", "ptq") else None,
        error_randomized=randomized if problem.method == "lotion" else None,
        stderr=stderr,
    )
