"""What does one coordinate-step of the simulator cost? Ours, a scalar numba loop and NumPy, interleaved in one run on one thread.

    python benchmarks/simulate.py [--rounds 15] [--out benchmarks/results/simulate.json]

A run of dimension d over time T costs d^2 T coordinate-steps, so nanoseconds per coordinate-step decide how large d can be. Every round
times every variant once, in an order that rotates; a figure is the best round, and a ratio is the median over rounds of variant / ours
within the round; time is CPU time of the thread, so that other processes disturb less. "scalar" is the loop one writes first, compiled,
with NumPy's normal generator called for every number; "numpy" is the reference of the tests, one vectorised NumPy statement per formula.
Both are float64. Needs `pip install "stepwell[dev]"`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numba
import numpy as np
from common import processor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the reference of the tests

from tests.reference.simulate import Model, sgd  # noqa: E402

from stepwell.theory.kernels import advance  # noqa: E402
from stepwell.theory.normal import aligned, fill_bits, fill_normal, new_stream  # noqa: E402
from stepwell.theory.problem import Problem  # noqa: E402
from stepwell.theory.runs import Runs, new_run  # noqa: E402
from stepwell.theory.staircase import Staircase  # noqa: E402

GRID, FINE = Staircase(2, 2.0), Staircase(8, 2.0)
UNEVEN = Staircase(4, 6.0, "levels", values=tuple(float(v) for v in (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)))
OURS = "ste, weights and inputs, d = 3000"
CASES = {
    OURS: (Problem(GRID, GRID, lr=0.2), 3000),
    "ste, weights and inputs, d = 300": (Problem(GRID, GRID, lr=0.2), 300),
    "ste, weights and inputs, d = 10000": (Problem(GRID, GRID, lr=0.2), 10_000),
    "ste, weights, d = 3000": (Problem(GRID, lr=0.2), 3000),
    "ste, 8 bits, d = 3000": (Problem(FINE, FINE, lr=0.2), 3000),
    "ste, 15 uneven levels, d = 3000": (Problem(UNEVEN, lr=0.2), 3000),
    "ste, smeared, d = 3000": (Problem(Staircase(2, 2.0, temperature=0.3), lr=0.2), 3000),
    "ste, weight decay (float64), d = 3000": (Problem(GRID, GRID, lr=0.2, weight_decay=0.1), 3000),
    "clipped ste, d = 3000": (Problem(GRID, GRID, "clipped_ste", lr=0.2), 3000),
    "lotion, d = 3000": (Problem(GRID, method="lotion", lr=0.2), 3000),
    "ptq, d = 3000": (Problem(GRID, method="ptq", lr=0.2), 3000),
}
WORK = 15_000_000  # coordinate-steps per timing


@numba.njit(cache=True)
def scalar(generator: np.random.Generator, w: np.ndarray, steps: int, levels: np.ndarray, lr: float) -> None:
    """The loop one writes first: STE with both quantizers, one number at a time."""
    d, first, delta, top = len(w), levels[0], levels[1] - levels[0], len(levels) - 1.0
    x = np.empty(d)
    for _ in range(steps):
        error = 0.0
        for i in range(d):
            draw = generator.standard_normal()
            x[i] = first + delta * min(max(np.floor((draw - first) / delta + 0.5), 0.0), top)
            error += draw - x[i] * (first + delta * min(max(np.floor((w[i] - first) / delta + 0.5), 0.0), top))
        push = lr / d * error
        for i in range(d):
            w[i] += push * x[i]


def ours(problem: Problem, dim: int) -> tuple[Callable[[], None], int]:
    run = new_run(Runs(problem, dim, 1, 0, "quantile", 1), 0, Event())
    steps = WORK // dim
    return lambda: advance(run.state, steps, run.weights, run.inputs, run.rule), steps * dim


def scalar_numba(dim: int) -> tuple[Callable[[], None], int]:
    generator, steps = np.random.default_rng(0), WORK // 3 // dim
    w = generator.standard_normal(dim)
    return lambda: scalar(generator, w, steps, GRID.levels, 0.2), steps * dim


def plain_numpy(dim: int) -> tuple[Callable[[], None], int]:
    generator, steps = np.random.default_rng(0), 200
    model = Model(GRID, GRID, "ste", 0.2)
    w = generator.standard_normal(dim)

    def run() -> None:
        sgd(model, w, np.ones(dim), generator.standard_normal((steps, 1, dim)), generator.standard_normal((steps, 1)))

    return run, steps * dim


def noise(normal: bool) -> tuple[Callable[[], None], int]:
    stream, bits, buffer = new_stream(np.random.SeedSequence(0)), aligned(3072, np.uint32), aligned(3072, np.float32)

    def run() -> None:
        for _ in range(WORK // 3072):
            fill_normal(stream, bits, buffer) if normal else fill_bits(stream, bits)

    return run, WORK // 3072 * 3072


def measure(rounds: int) -> dict[str, list[float]]:
    """Return nanoseconds per coordinate-step of every variant in every round."""
    variants = {name: ours(*case) for name, case in CASES.items()}
    variants |= {"scalar numba, d = 3000": scalar_numba(3000), "numpy, d = 3000": plain_numpy(3000)}
    variants |= {"only normal numbers": noise(True), "only random bits": noise(False)}
    names, times = list(variants), {name: [] for name in variants}
    for turn in range(rounds + 1):
        for k in range(len(names)):
            task, work = variants[name := names[(turn + k) % len(names)]]
            before = time.thread_time()
            task()
            if turn:  # the first round compiles
                times[name].append(1e9 * (time.thread_time() - before) / work)
        print(f"\rround {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "simulate.json")
    options = parser.parse_args()
    times = measure(options.rounds)
    rows = {
        name: {
            "best_ns": min(row),
            "median_ns": statistics.median(row),
            "ratio_to_ours": statistics.median(a / b for a, b in zip(row, times[OURS], strict=True)),
        }
        for name, row in times.items()
    }
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "numba": numba.__version__,
        "numpy": np.__version__,
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
        "unit": "nanoseconds per coordinate-step",
        "variants": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["machine"])
    print(f"{'variant':<40} {'best ns':>8} {'median':>8} {'x ours':>8}")
    for name, row in rows.items():
        print(f"{name:<40} {row['best_ns']:>8.2f} {row['median_ns']:>8.2f} {row['ratio_to_ours']:>8.2f}")


if __name__ == "__main__":
    main()
