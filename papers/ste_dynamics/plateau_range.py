"""Figure: plateau length against the quantization range, three mechanisms, measured on the exact limit against their estimates.

Dead zone: zero is a level (3 bits, lr 0.02, start N(0, 0.01)), L10. In-cell: no zero (2 bits, lr 0.1, start N(0, 0.01)), L90, because
a first drop comes before this plateau. Saturation: inputs on the same grid (2 bits, lr 0.1, start N(0, 1)), L10. Writes
results/plateau_range.svg and .csv, and results/plateau_slope.csv: the slope of the dead zone's length in the range, and of log length
in log range for saturation.
"""

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREY, save, write

from stepwell.theory import Problem, Staircase, closure, estimate, exact, plateau

LR_DEAD, LR = 0.02, 0.1


def dead_zone(omega: float) -> tuple[Problem, float]:
    return Problem(Staircase(3, omega, "tread"), lr=LR_DEAD, initial_variance=0.01), 20 * omega


def in_cell(omega: float) -> tuple[Problem, float]:
    return Problem(Staircase(2, omega), lr=LR, initial_variance=0.01), 60.0


def saturation(omega: float) -> tuple[Problem, float]:
    grid = Staircase(2, omega)
    return Problem(grid, grid, lr=LR), 40 / omega


MECHANISMS = {
    "dead zone": (dead_zone, np.arange(2.0, 5.51, 0.5)),
    "in-cell": (in_cell, np.arange(1.02, 1.36, 0.04)),
    "saturation": (saturation, np.geomspace(0.1, 1.0, 9)),
}


def main() -> None:
    rows = [measured(name, make, float(omega)) for name, (make, ranges) in MECHANISMS.items() for omega in ranges]
    write(
        "plateau_range.csv", ("mechanism", "range", "estimate", "exact", "closure", "L10", "L90", "sharpness", "flat_until", "status"), rows
    )
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4))
    for name, axis in zip(MECHANISMS, axes, strict=True):
        omega, guess, solved, closed = (np.array([row[k] for row in rows if row[0] == name], float) for k in (1, 2, 3, 4))
        axis.plot(omega, guess, color=GREY, linestyle="--", label="estimate")
        axis.plot(omega, closed, color=BROWN, marker="s", markersize=4, linewidth=1, label="Gaussian closure")
        axis.plot(omega, solved, color=BLUE, marker="o", markersize=4, linewidth=1, label="exact limit")
        axis.set(title=name, xlabel="range")
        if name == "saturation":
            axis.set(xscale="log", yscale="log")
        else:
            axis.set_ylim(0, None)
    axes[0].set_ylabel("plateau length (t = steps / d)")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, "plateau_range.svg")
    dead = np.array([row[1:4] for row in rows if row[0] == "dead zone"], float)
    steep = np.array([row[1:4] for row in rows if row[0] == "saturation"], float)
    slopes = [
        ("dead zone: dL10 / drange", np.polyfit(dead[:, 0], dead[:, 2], 1)[0], np.polyfit(dead[:, 0], dead[:, 1], 1)[0]),
        ("dead zone: 1 / (2 lr (2^(bits-1) - 1)), limit of small lr", 1 / (2 * LR_DEAD * 3), 1 / (2 * LR_DEAD * 3)),
        ("saturation: dlog L10 / dlog range", *(np.polyfit(np.log(steep[:, 0]), np.log(steep[:, k]), 1)[0] for k in (2, 1))),
    ]
    write("plateau_slope.csv", ("slope", "exact", "estimate"), slopes)
    for row in slopes:
        print(f"{row[0]}: exact {row[1]:.3f}, estimate {row[2]:.3f}")


def measured(name: str, make: object, omega: float) -> tuple[object, ...]:
    problem, window = make(omega)  # type: ignore[operator]
    times = np.linspace(0, window, 801)
    solved, guess = exact(problem, times), estimate(problem, window)
    curves = [plateau(solved), plateau(closure(problem, times))]
    lengths = [p.l90 if name == "in-cell" else p.l10 for p in curves]
    return (
        name,
        omega,
        guess.l10 if guess.mechanism == name else np.nan,
        *lengths,
        curves[0].l10,
        curves[0].l90,
        curves[0].sharpness,
        solved.status,
    )


if __name__ == "__main__":
    main()
