"""How long do the theory's solvers take? Each beside a plain NumPy/SciPy twin, interleaved in one run on one thread.

    python benchmarks/theory.py [--rounds 9] [--out benchmarks/results/theory.json]

Every round times every task once, ours and its twin one after the other; a figure is the best round in wall time, the ratio is the median
over rounds of twin / ours within the round. The twins:

- closure: the two equations of the tests' paper-notation reference with the Gaussian integrals in closed form and a general-purpose LSODA
  call (`solve_ivp`), as one writes it first; the sweep's twin is that one, measured on 20 points and scaled to 1,000;
- exact: the same grids and steps with NumPy and SciPy's banded solver instead of the compiled loop;
- stationary: relaxation of the exact dynamics to t = 200.

Needs `pip install "stepwell[dev]"`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import scipy  # noqa: E402
from scipy.integrate import solve_ivp  # noqa: E402
from scipy.special import ndtr  # noqa: E402

from stepwell.theory import Problem, Staircase, closure, exact, stationary, sweep  # noqa: E402

GRID = Staircase(2, 2.0)
P1 = Problem(GRID, GRID, lr=0.2)
P5 = Problem(Staircase(1, 1.0), lr=0.3, label_noise=0.2, teacher="gauss")
P8BITS = Problem(Staircase(8, 2.0), lr=0.2)
P9 = Problem(Staircase(3, 2.0), method="lotion", lr=0.1)
CURVE = np.linspace(0, 50, 101)
RANGES = np.linspace(0.5, 4.0, 143)  # with 7 bit widths: 1,001 points


@dataclass(frozen=True)
class Task:
    """Ours, its twin if it has one, and how many times the twin's work fits into ours."""

    ours: Callable[[], object]
    twin: Callable[[], object] | None = None
    scale: float = 1.0
    budget: float | None = None
    """what the project promises, in milliseconds"""


def plain_closure(problem: Problem, times: np.ndarray) -> np.ndarray:
    """The closure for a teacher of ones and R = 1, straight from the equations for (m, v)."""
    p, grid = problem, problem.weights
    levels, thresholds, steps = grid.levels, grid.thresholds, grid.steps

    def integrals(m: float, v: float) -> tuple[float, float, float]:
        s = np.sqrt(max(v, 1e-18))
        z = (thresholds - m) / s
        above = ndtr(-z)
        slope = np.sum(steps * np.exp(-z * z / 2)) / (s * np.sqrt(2 * np.pi))
        return levels[0] + steps @ above, levels[0] ** 2 + np.diff(levels**2) @ above, slope

    def derivative(t: float, y: np.ndarray) -> list[float]:
        m_psi, q_psi, slope = integrals(*y)
        energy = 1 + p.label_noise**2 - 2 * p.gain * m_psi + p.power * q_psi
        return [p.lr * (p.gain - p.power * m_psi), -2 * p.lr * p.power * slope * y[1] + p.lr**2 * p.power * energy]

    y = solve_ivp(derivative, (0, times[-1]), [0.0, 1.0], method="LSODA", t_eval=times, rtol=1e-8, atol=1e-11).y
    return np.array([(1 - 2 * p.gain * a + p.power * b) / 2 for a, b, _ in (integrals(m, v) for m, v in y.T)])


def plain_exact(problem: Problem, times: np.ndarray) -> np.ndarray:
    """The same solver without numba."""
    with patch.dict(sys.modules, {"stepwell.theory.compiled": None}):
        return exact(problem, times).error


def plain_sweep(points: int) -> None:
    times = np.concatenate([[0.0], np.geomspace(0.04, 40, 400)])
    for k in range(points):
        plain_closure(Problem(Staircase(2 + k % 7, 0.5 + 3.5 * k / points), lr=0.2), times)


def command() -> None:
    """The whole command, from a cold process to the written figure."""
    code = "import sys, pathlib, io, contextlib; from stepwell.commands.predict import predict\n"
    code += "with contextlib.redirect_stdout(io.StringIO()): predict(lr=.2, input_bits=2, figure=pathlib.Path(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, f"{folder}/predict.svg"], check=True)


TASKS = {
    "closure, 2 bits, t = 50, 101 times": Task(lambda: closure(P1, CURVE), lambda: plain_closure(P1, CURVE), budget=2),
    "closure, 8 bits, t = 50, 101 times": Task(lambda: closure(P8BITS, CURVE), lambda: plain_closure(P8BITS, CURVE), budget=2),
    "sweep of 1,001 points, 2 to 8 bits": Task(
        lambda: sweep(Problem(GRID, lr=0.2), 40.0, bits=range(2, 9), ranges=RANGES), lambda: plain_sweep(21), 1001 / 21, budget=2000
    ),
    "exact, one teacher node, t = 40, 101 times": Task(
        lambda: exact(P1, np.linspace(0, 40, 101)), lambda: plain_exact(P1, np.linspace(0, 40, 101)), budget=100
    ),
    "exact, one teacher node, t = 40, 401 times": Task(lambda: exact(P1, np.linspace(0, 40, 401)), budget=100),
    "exact, LOTION, t = 40, 101 times": Task(
        lambda: exact(P9, np.linspace(0, 40, 101)), lambda: plain_exact(P9, np.linspace(0, 40, 101)), budget=100
    ),
    "exact, Gaussian teacher, t = 20, 101 times": Task(
        lambda: exact(P5, np.linspace(0, 20, 101)), lambda: plain_exact(P5, np.linspace(0, 20, 101)), budget=3000
    ),
    "stationary, exact, 2 bits": Task(lambda: stationary(P1), lambda: exact(P1, [200.0])),
    "stationary, closure, 2 bits": Task(lambda: stationary(P1, limit="closure")),
    "the whole command, cold process": Task(command),
}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds of every task and twin in every round; the first round, which compiles, is left out."""
    times = {name: {"ours": [], "twin": []} for name in TASKS}
    for turn in range(rounds + 1):
        for name, task in TASKS.items():
            for kind, run in (("ours", task.ours), ("twin", task.twin)):
                if run is None:
                    continue
                before = time.perf_counter()
                run()
                if turn:
                    times[name][kind].append(1e3 * (time.perf_counter() - before) * (task.scale if kind == "twin" else 1))
        print(f"\rround {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or "unknown processor"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "theory.json")
    options = parser.parse_args()
    times = measure(options.rounds)
    rows = {}
    for name, row in times.items():
        rows[name] = {"best_ms": min(row["ours"]), "median_ms": statistics.median(row["ours"]), "budget_ms": TASKS[name].budget}
        if row["twin"]:
            rows[name]["twin_best_ms"] = min(row["twin"])
            rows[name]["ratio"] = statistics.median(b / a for a, b in zip(row["ours"], row["twin"], strict=True))
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
        "tasks": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["machine"])
    print(f"{'task':<46} {'best ms':>9} {'median':>9} {'budget':>9} {'twin':>9} {'twin/ours':>9}")
    for name, row in rows.items():
        cells = (row["best_ms"], row["median_ms"], row["budget_ms"], row.get("twin_best_ms"), row.get("ratio"))
        print(f"{name:<46}", *(f"{'-' if cell is None else format(cell, '.4g'):>9}" for cell in cells))


if __name__ == "__main__":
    main()
