"""Figure: LOTION against STE against plain rounding, in the exact limit.

Left: learning curves (3 bits, range 2, lr 0.1, noise 0.3) with d = 3000 simulations. Right: final error against the range (3 bits,
lr 0.1, noise 0.3). LOTION with strength 1 is shown rounded to nearest and rounded at random. Writes results/methods.svg,
results/methods_curves.csv, results/methods_range.csv and results/methods_end.csv (three grids, side by side).
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREEN, GREY, save, write

from stepwell.theory import Problem, Staircase, exact, simulate, stationary

STE = Problem(Staircase(3, 2.0), lr=0.1, label_noise=0.3)
TIMES = np.concatenate([[0.0], np.geomspace(0.5, 80, 30)])
RANGES = np.linspace(1.05, 3.0, 79)
DIM, SEEDS = 3000, 4
COLOURS = {"STE": BLUE, "PTQ": GREY, "LOTION": GREEN, "LOTION, at random": BROWN}


def variants(ste: Problem) -> tuple[Problem, Problem, Problem]:
    return ste, replace(ste, method="ptq"), replace(ste, method="lotion")


def main() -> None:
    solved = [exact(p, TIMES) for p in variants(STE)]
    simulated = [simulate(p, TIMES, dim=DIM, seeds=SEEDS) for p in variants(STE)]
    curves = {"STE": solved[0].error, "PTQ": solved[1].error, "LOTION": solved[2].error, "LOTION, at random": solved[2].error_randomized}
    dots = {
        "STE": simulated[0].error,
        "PTQ": simulated[1].error,
        "LOTION": simulated[2].error,
        "LOTION, at random": simulated[2].error_randomized,
    }
    write(
        "methods_curves.csv",
        ("t", *COLOURS, *(f"{n} simulated" for n in COLOURS)),
        list(zip(TIMES, *curves.values(), *dots.values(), strict=True)),
    )
    by_range = [(omega, *ends(3, float(omega))) for omega in RANGES]
    write("methods_range.csv", ("range", *COLOURS), by_range)
    three = [(f"{bits} bits, range {omega:g}", *ends(bits, omega)) for bits, omega in ((3, 2.0), (3, 1.5), (4, 2.0))]
    write("methods_end.csv", ("grid", *COLOURS), three)

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.7))
    for k, (name, colour) in enumerate(COLOURS.items()):
        axes[0].plot(TIMES[1:], curves[name][1:], color=colour, label=name)
        axes[0].plot(TIMES[1::2], dots[name][1::2], ".", color=colour, markersize=4)
        axes[1].plot(RANGES, [row[k + 1] for row in by_range], color=colour, label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="t = steps / d", ylabel="generalization error", title="3 bits, range 2 (dots: d = 3000)")
    axes[1].set(yscale="log", xlabel="range", title="final error, 3 bits")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, "methods.svg")
    wins = np.array([[row[1] >= row[2] - 1e-9, row[3] <= row[1] + 1e-9, row[3] <= row[2] + 1e-9] for row in by_range]).mean(axis=0)
    print(
        f"of {len(RANGES)} ranges: STE not below PTQ {wins[0]:.0%}, LOTION not above STE {wins[1]:.0%}, LOTION not above PTQ {wins[2]:.0%}"
    )
    for row in three:
        print(row[0], *(f"{name} {value:.5f}" for name, value in zip(COLOURS, row[1:], strict=True)))


def ends(bits: int, omega: float) -> tuple[float, ...]:
    ste, ptq, lotion = (stationary(p) for p in variants(replace(STE, weights=Staircase(bits, omega))))
    assert lotion.error_randomized is not None
    return ste.error, ptq.error, lotion.error, lotion.error_randomized


if __name__ == "__main__":
    main()
