"""Figure: the distance of a simulation to the exact limit falls as d^(-1/2); the distance to the Gaussian closure does not.

Five settings, four dimensions, eight runs each; distance = largest error in t = 0..20, and its mean over time. Writes
results/convergence.svg, results/convergence.csv (mean over the runs with its standard error) and results/convergence_slope.csv:
the slope of log distance in log d per setting, and pooled, which is the mean of the five slopes; standard errors by resampling runs.
Takes two minutes on one core.
"""

import csv
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from stepwell.theory.closure import closure
from stepwell.theory.exact import exact
from stepwell.theory.problem import Problem
from stepwell.theory.simulate import simulate
from stepwell.theory.staircase import Staircase

RESULTS = Path(__file__).parent / "results"
COARSE, FINE = Staircase(2, 2.0), Staircase(4, 2.0)
ROWS = {
    "P1": Problem(COARSE, COARSE, lr=0.2),
    "P2": Problem(Staircase(3, 1.5), lr=0.1, label_noise=0.3),
    "P3": Problem(FINE, FINE, lr=0.5, label_noise=0.5),
    "P4": Problem(Staircase(3, 4.0, "tread"), lr=0.1, initial_variance=0.01),
    "P5": Problem(Staircase(1, 1.0), lr=0.3, label_noise=0.2, teacher="gauss"),
}
DIMS = (300, 1000, 3000, 10_000)
SEEDS = 8
TIMES = np.linspace(0, 20, 81)


def main() -> None:
    limits = {name: (exact(p, TIMES).error, closure(p, TIMES).error) for name, p in ROWS.items()}
    curves = np.array(
        [[[simulate(p, TIMES, dim=d, seeds=1, seed=1000 * k).error for k in range(SEEDS)] for d in DIMS] for p in ROWS.values()]
    )  # (settings, dims, seeds, times)
    to_exact = np.abs(curves - np.array([limits[name][0] for name in ROWS])[:, None, None])
    to_closure = np.abs(curves - np.array([limits[name][1] for name in ROWS])[:, None, None])
    largest, mean, closure_largest = to_exact.max(-1), np.trapezoid(to_exact, TIMES) / TIMES[-1], to_closure.max(-1)

    rows = [
        (name, d, *(f(x[i, j]) for x in (largest, mean, closure_largest) for f in (np.mean, standard_error)))
        for i, name in enumerate(ROWS)
        for j, d in enumerate(DIMS)
    ]
    header = ("row", "d", "sup_exact", "sup_exact_stderr", "mean_exact", "mean_exact_stderr", "sup_closure", "sup_closure_stderr")
    write("convergence.csv", header, rows)
    slopes = table(largest, mean)
    write("convergence_slope.csv", ("row", "sup_slope", "sup_slope_stderr", "mean_slope", "mean_slope_stderr"), slopes)
    draw(largest, closure_largest)
    for row in slopes:
        print(f"{row[0]}: slope of the largest distance {row[1]:.3f} +- {row[2]:.3f}, of the mean {row[3]:.3f} +- {row[4]:.3f}")
    worst = [np.max(x.mean(axis=2) * np.sqrt(DIMS)) for x in (largest, mean)]
    print(f"worst distance times sqrt(d): largest {worst[0]:.2f}, mean {worst[1]:.2f}")


def table(largest: np.ndarray, mean: np.ndarray) -> list[tuple[str | float, ...]]:
    """Return slopes with standard errors, per setting and pooled; distances are `(settings, dims, seeds)`."""
    generator = np.random.default_rng(0)
    columns = []
    for x in (largest, mean):
        drawn = np.array([slope(np.take_along_axis(x, generator.integers(0, SEEDS, x.shape), axis=2)) for _ in range(1000)])
        columns += [[*slope(x), slope(x).mean()], [*drawn.std(axis=0), drawn.mean(axis=1).std()]]
    return [(name, *(column[i] for column in columns)) for i, name in enumerate([*ROWS, "pooled"])]


def slope(distances: np.ndarray) -> np.ndarray:
    """Return the slope of log(mean over seeds) in log d, `(settings,)`."""
    return np.polyfit(np.log(DIMS), np.log(distances.mean(axis=2)).T, 1)[0]


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / sqrt(len(values)))


def draw(largest: np.ndarray, closure_largest: np.ndarray) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    for axis, x, title in ((axes[0], largest, "to the exact limit"), (axes[1], closure_largest, "to the Gaussian closure")):
        for i, (name, marker) in enumerate(zip(ROWS, "os^Dv", strict=True)):
            error = [standard_error(values) for values in x[i]]
            axis.errorbar(DIMS, x[i].mean(axis=1), error, marker=marker, linewidth=1, markersize=4, capsize=2, label=name)
        axis.plot(DIMS, 1 / np.sqrt(DIMS), color="#999999", linestyle="--", label="$d^{-1/2}$")
        axis.set(xscale="log", yscale="log", xlabel="dimension d", title=f"distance {title}")
    axes[0].set_ylabel("largest distance in t = 0..20")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "stepwell"  # the same picture gives the same file
    figure.savefig(RESULTS / "convergence.svg", metadata={"Date": None})


def write(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([value if isinstance(value, str) else f"{value:.6g}" for value in row] for row in rows)


if __name__ == "__main__":
    main()
