"""Table and figure: five ways in which straight-through training fails in the toy, and what cures them.

One row per run: ties, no lattice point in the basin, a jump over a narrow basin, a clipped lattice, each with the change that helps.
Shares over random valleys that RTN leaves (12 dimensions, 2 normals, r = 0.3): the learning rate, and a wall that levels off (lr 0.075).
Writes results/toy_failures.svg, toy_failures.csv (single runs), toy_failures_share.csv and toy_failures_ties.csv (how small a
perturbation of a tie helps).
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREEN, GREY, RED, Array, outside, save, share, write
from toy_staircase import family

from stepwell.theory import Valley

DIAGONAL = np.ones(2) / np.sqrt(2)
NORMAL, POINT = family(16)
DRAWS, STEPS = 300, 3000
RATES, LENGTHS = (0.005, 0.02, 0.075, 0.3, 1.0, 3.0), (None, 0.3, 0.1, 0.03)
# name: (valley, w, lr)
RUNS = {
    "tie": (Valley([DIAGONAL], [0.40, 0.40], 0.3), [0.40, 0.40], 0.05),
    "tie, moved by 0.02": (Valley([DIAGONAL], [0.42, 0.36], 0.3), [0.42, 0.36], 0.05),
    "no lattice point": (Valley([[1, 0]], [0.5, 0.1], 0.3), [0.5, 0.1], 0.05),
    "a river beside a lattice line": (Valley([[1, 0]], [0.25, 0.1], 0.3), [0.55, 0.1], 0.05),
    "jump over it": (Valley([NORMAL], POINT, 0.05), POINT, 0.02),
    "the same, r = J / 2": (Valley([NORMAL], POINT, 0.2165), POINT, 0.02),
    "clipped lattice": (Valley([[0.8, 0.6]], [1.4, 1.4], 0.25, limit=1), [1.4, 1.4], 0.02),
    "the same, unbounded": (Valley([[0.8, 0.6]], [1.4, 1.4], 0.25), [1.4, 1.4], 0.02),
}


def main() -> None:
    rng = np.random.default_rng(24)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4))
    table = []
    for name, (valley, w, lr) in RUNS.items():
        run = valley.ste(w, lr=lr, steps=STEPS)
        n, near = valley.distance(run.points)[:, 0], len(valley.near(w)) if len(w) < 12 else len(valley.corners(w))
        entry = "never" if run.first_entry is None else run.first_entry
        late = sorted({f"{value:.4f}" for value in n[-200:]}, key=float)
        table.append((name, entry, valley.loss(run.points[0]), valley.loss(run.points[-1]), near, " ".join(late)))
        print(*table[-1])
    write("toy_failures.csv", ("case", "T", "loss_rtn", "loss_last", "inside_near", "n_late"), table)
    for axis, failing, cured in zip(axes.flat, list(RUNS)[::2], list(RUNS)[1::2], strict=False):
        draw_runs(axis, failing, cured)
    ties(rng)
    cases = outside(rng, DRAWS, 2, 12, 0.3)
    rows = [step_row(cases, lr) for lr in RATES] + [wall_row(cases, length) for length in LENGTHS]
    header = ("what", "value", "recovered", "recovered_se", "median_T", "T_low", "T_high", "runs")
    write("toy_failures_share.csv", header, rows)
    for row in rows:
        print(f"{row[0]} {row[1]}: recovered {row[2]:.3f} ± {row[3]:.3f}, median T {row[4]:g}")
    draw_shares(axes.flat[4], axes.flat[5], rows)
    save(figure, "toy_failures.svg")


def draw_runs(axis: plt.Axes, failing: str, cured: str) -> None:
    """Show the distance of the deployed point across the valley, in units of the half-width."""
    for name, colour in ((cured, GREEN), (failing, RED)):
        valley, w, lr = RUNS[name]
        n = valley.distance(valley.ste(w, lr=lr, steps=60).points)[:, 0] / valley.half_width
        axis.plot(n, ".", color=colour, markersize=4, label=name)
        axis.plot(n, color=colour, linewidth=0.3)
    axis.axhspan(-1, 1, color=GREEN, alpha=0.15, linewidth=0)
    low, high = axis.get_ylim()
    axis.set(xlabel="step", ylabel="distance / half-width", ylim=(low, high + 0.35 * (high - low)))
    axis.legend(frameon=False, fontsize=8, loc="upper right")


def ties(rng: np.random.Generator) -> None:
    """Break the tie of case A-tie by random noise of different sizes."""
    rows = []
    for size in (0.0, 1e-6, 1e-3, 5e-3, 1e-2, 2e-2, 5e-2):
        entered = []
        for _ in range(100 if size else 1):
            w = 0.4 + size * rng.normal(size=2)
            valley = Valley([DIAGONAL], w, 0.3)
            entered.append([valley.ste(w, lr=lr, steps=400).first_entry is not None for lr in (0.05, 0.005)])
        rows.append((size, *(number for column in np.array(entered).T for number in share(column)), len(entered)))
        print(f"tie, noise {size:g}: entered {rows[-1][1]:.2f} at lr 0.05, {rows[-1][3]:.2f} at lr 0.005")
    write("toy_failures_ties.csv", ("noise", "entered_lr_0.05", "se_lr_0.05", "entered_lr_0.005", "se_lr_0.005", "runs"), rows)


def step_row(cases: list[tuple[Valley, Array]], lr: float) -> tuple[object, ...]:
    return "lr", lr, *recovered([valley.ste(w, lr=lr, steps=STEPS).first_entry for valley, w in cases])


def wall_row(cases: list[tuple[Valley, Array]], length: float | None) -> tuple[object, ...]:
    """Return the row of a wall that levels off over `length`; None is linear."""
    walls = [(valley if length is None else replace(valley, wall="saturating", saturation=length), w) for valley, w in cases]
    return "saturation", "linear" if length is None else length, *recovered([v.ste(w, lr=0.075, steps=STEPS).first_entry for v, w in walls])


def recovered(entries: list[int | None]) -> tuple[float, ...]:
    """Return the share that enters with its error, and median and quartiles of the step at which."""
    steps = [entry for entry in entries if entry is not None]
    low, median, high = np.percentile(steps, (25, 50, 75))
    return *share([entry is not None for entry in entries]), float(median), float(low), float(high), len(entries)


def draw_shares(left: plt.Axes, right: plt.Axes, rows: list[tuple[object, ...]]) -> None:
    by_step = [row for row in rows if row[0] == "lr"]
    left.errorbar(
        [row[1] for row in by_step], [row[2] for row in by_step], [row[3] for row in by_step], color=BLUE, marker="o", markersize=3
    )
    left.set(xscale="log", xlabel="learning rate", ylabel="recovered of what RTN lost", ylim=(0, 1.03), title="d = 12, k = 2, r = 0.3")
    walls = [row for row in rows if row[0] == "saturation"]
    places = range(len(walls))
    right.bar(places, [row[4] for row in walls], color=BROWN)
    right.vlines(places, [row[5] for row in walls], [row[6] for row in walls], color=GREY)
    right.set(xticks=places, xticklabels=[str(row[1]) for row in walls], yscale="log", xlabel="wall: length over which it levels off")
    right.set(ylabel="median first entry (grey: quartiles)", title="lr 0.075")


if __name__ == "__main__":
    main()
