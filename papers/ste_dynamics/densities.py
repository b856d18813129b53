"""Figure: the law of a latent weight, predicted and simulated. It does not stay Gaussian once weights are quantized.

Weights and inputs on 2 bits with range 2, learning rate 0.1, no label noise, teacher of ones; the histogram is one run with d = 3000.
Writes results/densities.svg (the picture), results/densities.csv (its numbers) and results/densities_distance.csv, the
Kolmogorov-Smirnov distance of the weights of every run to the exact law and to the Gaussian closure.
"""

import csv
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import ndtr

from stepwell.theory.closure import closure_state
from stepwell.theory.exact import exact
from stepwell.theory.problem import Problem
from stepwell.theory.simulate import simulate_weights
from stepwell.theory.staircase import Staircase

RESULTS = Path(__file__).parent / "results"
TIMES = np.array([10.0, 25.0, 50.0, 100.0])
DIM, SEEDS, CELLS = 3000, 8, 65
CRITICAL = 1.358 / sqrt(DIM)  # 5 % of samples of the law itself lie further away


def main() -> None:
    grid = Staircase(bits=2, range=2.0)
    problem = Problem(weights=grid, inputs=grid, lr=0.1)
    law = exact(problem, TIMES, density=True).density
    assert law is not None
    state, _ = closure_state(problem, TIMES)
    weights = simulate_weights(problem, TIMES, dim=DIM, seeds=SEEDS).weights

    bins = np.linspace(-0.8, 1.8, CELLS + 1)
    centre = (bins[1:] + bins[:-1]) / 2
    rows, distances = [], []
    figure, axes = plt.subplots(1, len(TIMES), figsize=(12, 3), sharey=True)
    for k, (t, axis) in enumerate(zip(TIMES, axes, strict=True)):
        mean, deviation = state.m[k], sqrt(state.v[k])
        cdf = np.interp(bins, law.edges[0], law.cdf(k))
        predicted = np.diff(cdf) / np.diff(bins)
        gaussian = np.diff(ndtr((bins - mean) / deviation)) / np.diff(bins)
        histogram = np.histogram(weights[k, 0], bins)[0] / (DIM * np.diff(bins))
        rows += [(t, *row) for row in zip(centre, histogram, predicted, gaussian, strict=True)]
        for seed in range(SEEDS):
            ordered = np.sort(weights[k, seed].astype(float))
            to_exact = distance(np.interp(ordered, law.edges[0], law.cdf(k)))
            distances.append((t, seed, to_exact, distance(ndtr((ordered - mean) / deviation)), CRITICAL))
        axis.stairs(histogram, bins, fill=True, color="#c9d3df", label=f"simulation, d = {DIM}")
        axis.plot(centre, gaussian, color="#b5651d", linestyle="--", label="Gaussian closure")
        axis.plot(centre, predicted, color="#1f4e8c", label="exact limit")
        for threshold in grid.thresholds:
            axis.axvline(threshold, color="#999999", linewidth=0.6, linestyle=":")
        axis.set(title=f"t = {t:g}", xlabel="latent weight", xlim=(bins[0], bins[-1]))
    axes[0].set_ylabel("density")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    save(figure, "densities.svg")
    write("densities.csv", ("t", "weight", "simulation", "exact", "closure"), rows)
    write("densities_distance.csv", ("t", "seed", "to_exact", "to_closure", "critical_5_percent"), distances)
    for t in TIMES:
        mine = np.array([row[2:4] for row in distances if row[0] == t])
        print(f"t = {t:g}: distance to exact {mine[:, 0].mean():.3f}, to closure {mine[:, 1].mean():.3f}, critical {CRITICAL:.3f}")


def distance(cdf_at_sorted: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov distance from the distribution function at the sorted sample."""
    ranks = np.arange(len(cdf_at_sorted) + 1) / len(cdf_at_sorted)
    return float(max(np.max(cdf_at_sorted - ranks[:-1]), np.max(ranks[1:] - cdf_at_sorted)))


def save(figure: plt.Figure, name: str) -> None:
    plt.rcParams["svg.hashsalt"] = "stepwell"  # the same picture gives the same file
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / name, metadata={"Date": None})


def write(name: str, header: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{value:.6g}" for value in row] for row in rows)


if __name__ == "__main__":
    main()
