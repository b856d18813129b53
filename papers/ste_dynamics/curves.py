"""Figure: learning curves for several bit widths and ranges, predicted by the exact limit and simulated at d = 3000.

Weights and inputs on the same grid, learning rate 0.2, no label noise, teacher of ones, N(0, 1) start, four runs each. Writes
results/curves.svg, results/curves.csv (the curves) and results/curves_distance.csv (largest distance of the simulated mean to both
theories).
"""

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, save, write

from stepwell.theory import Problem, Staircase, closure, exact, simulate

SETTINGS = ((1, 1.0), (2, 0.5), (2, 1.0), (2, 2.0), (3, 1.5), (4, 2.0))
TIMES = np.concatenate([[0.0], np.geomspace(0.1, 60, 40)])
DIM, SEEDS, LR = 3000, 4, 0.2


def main() -> None:
    rows, distances = [], []
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True)
    for (bits, omega), axis in zip(SETTINGS, axes.flat, strict=True):
        grid = Staircase(bits, omega)
        problem = Problem(grid, grid, lr=LR)
        solved, closed = exact(problem, TIMES), closure(problem, TIMES)
        simulated = simulate(problem, TIMES, dim=DIM, seeds=SEEDS)
        rows += [(bits, omega, *row) for row in zip(TIMES, solved.error, closed.error, simulated.error, simulated.stderr, strict=True)]
        gaps = [float(np.max(np.abs(simulated.error - theory.error))) for theory in (solved, closed)]
        distances.append((bits, omega, *gaps, 1 / np.sqrt(DIM), solved.status))
        axis.plot(TIMES[1:], closed.error[1:], color=BROWN, linestyle="--", label="Gaussian closure")
        axis.plot(TIMES[1:], solved.error[1:], color=BLUE, label="exact limit")
        axis.errorbar(TIMES[1::2], simulated.error[1::2], simulated.stderr[1::2], fmt="k.", markersize=4, label=f"simulation, d = {DIM}")
        axis.set(xscale="log", title=f"{bits} bit{'s' if bits > 1 else ''}, range {omega:g}", ylim=(0, None))
    for axis in axes[1]:
        axis.set_xlabel("t = steps / d")
    for axis in axes[:, 0]:
        axis.set_ylabel("generalization error")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, "curves.svg")
    write("curves.csv", ("bits", "range", "t", "exact", "closure", "simulation", "stderr"), rows)
    write("curves_distance.csv", ("bits", "range", "sup_exact", "sup_closure", "d^-1/2", "status"), distances)
    for row in distances:
        print(f"{row[0]} bits, range {row[1]:g}: {row[2]:.4f} to the exact limit, {row[3]:.4f} to the closure")


if __name__ == "__main__":
    main()
