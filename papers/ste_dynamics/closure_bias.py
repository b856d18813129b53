"""Figure: where the Gaussian closure fails. Its distance to the exact limit is a bias: it does not shrink with the dimension.

Left and middle: two learning curves with d = 3000 simulations (one bit and a Gaussian teacher; a learning rate beyond the linear
threshold). Right: largest distance of closure and exact limit over t = 0..20 against bits (range 2, or 1 for one bit; lr 0.2,
noise 0.2), for both teachers. Writes results/closure_bias.svg, results/closure_bias_curves.csv and results/closure_bias_bits.csv.
"""

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREEN, save, write

from stepwell.theory import Problem, Staircase, closure, exact, simulate

DIM, SEEDS = 3000, 4
TIMES = np.linspace(0, 20, 41)
CURVES = {
    "one bit, Gaussian teacher": Problem(Staircase(1, 1.0), lr=0.3, label_noise=0.2, teacher="gauss"),
    "3 bits, lr 2.5": Problem(Staircase(3, 2.0), lr=2.5, label_noise=0.3),
}


def main() -> None:
    rows = []
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5))
    for axis, (name, problem) in zip(axes, CURVES.items(), strict=False):
        solved, closed = exact(problem, TIMES).error, closure(problem, TIMES).error
        simulated = simulate(problem, TIMES, dim=DIM, seeds=SEEDS)
        rows += [(name, *row) for row in zip(TIMES, solved, closed, simulated.error, simulated.stderr, strict=True)]
        axis.plot(TIMES, closed, color=BROWN, linestyle="--", label="Gaussian closure")
        axis.plot(TIMES, solved, color=BLUE, label="exact limit")
        axis.errorbar(TIMES[::2], simulated.error[::2], simulated.stderr[::2], fmt="k.", markersize=4, label=f"simulation, d = {DIM}")
        axis.set(title=name, xlabel="t = steps / d", ylim=(0, None))
    write("closure_bias_curves.csv", ("setting", "t", "exact", "closure", "simulation", "stderr"), rows)

    bias = [(teacher, bits, *gaps(teacher, bits)) for teacher in ("one", "gauss") for bits in range(1, 7)]
    write("closure_bias_bits.csv", ("teacher", "bits", "largest_distance", "final_distance"), bias)
    for teacher, colour, marker in (("one", BLUE, "o"), ("gauss", GREEN, "^")):
        mine = [row for row in bias if row[0] == teacher]
        axes[2].plot([row[1] for row in mine], [row[2] for row in mine], color=colour, marker=marker, label=f"teacher {teacher}")
    axes[2].set(yscale="log", xlabel="bits per weight", title="largest distance to the exact limit")
    axes[0].set_ylabel("generalization error")
    axes[0].legend(frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=8)
    save(figure, "closure_bias.svg")
    for row in bias:
        print(f"teacher {row[0]}, {row[1]} bits: largest {row[2]:.4f}, final {row[3]:+.4f}")


def gaps(teacher: str, bits: int) -> tuple[float, float]:
    problem = Problem(Staircase(bits, 1.0 if bits == 1 else 2.0), lr=0.2, label_noise=0.2, teacher=teacher)  # type: ignore[arg-type]
    difference = closure(problem, TIMES).error - exact(problem, TIMES).error
    return float(np.max(np.abs(difference))), float(difference[-1])


if __name__ == "__main__":
    main()
