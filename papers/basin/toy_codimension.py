"""Table and figure: how many corners lie in the basin, how well a count predicts that one does, and how often training finds it.

Floor/ceil corners of a random point: in Gaussian approximation 2^d V_k r^k / (2 pi / 3)^(k/2) of them lie in the basin, with V_k the
volume of the unit ball; a Poisson law would then make 1 - exp(-count) the chance of at least one. d = 12 and, for some, d = 16.
Given that RTN fails: a corner exists, STE (lr 0.02, 1500 steps) enters, and whether its entry is a step or less per coordinate from RTN.
Writes results/toy_codimension.svg and toy_codimension.csv.
"""

from math import gamma, pi

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREY, mean, outside, save, share, unit_normals, write

from stepwell.theory import Valley

SETTINGS = (
    *((12, k, r) for k, r in ((1, 0.15), (2, 0.3), (4, 0.3), (4, 0.5), (6, 0.5), (8, 0.5), (8, 0.7), (12, 0.7))),
    *((16, k, r) for k, r in ((4, 0.3), (8, 0.5), (8, 0.7), (12, 0.7))),
)
DRAWS, FAILURES, LR, STEPS = 400, 200, 0.02, 1500


def main() -> None:
    rng = np.random.default_rng(26)
    rows = [row(rng, *setting) for setting in SETTINGS]
    names = ("count", "exists", "rtn_inside", "exists_if_rtn_fails", "ste_if_rtn_fails", "ste_if_it_exists")
    write(
        "toy_codimension.csv", ("d", "k", "half_width", "predicted", "poisson", *(c for name in names for c in (name, f"{name}_se"))), rows
    )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    predicted, found = np.array([r[3] for r in rows]), np.array([r[5:9] for r in rows], dtype=float)
    axes[0].errorbar(predicted, found[:, 0], found[:, 1], fmt="o", color=BLUE, markersize=4)
    line = np.array([predicted.min(), predicted.max()])
    axes[0].plot(line, line, color=GREY, linewidth=1)
    axes[0].set(xscale="log", yscale="log", xlabel="predicted corners in the basin", ylabel="mean count")
    axes[1].bar(np.arange(len(rows)) - 0.2, [r[11] for r in rows], 0.4, color=GREY, label="a corner exists")
    axes[1].bar(np.arange(len(rows)) + 0.2, [r[13] for r in rows], 0.4, yerr=[r[14] for r in rows], color=BROWN, label="STE enters")
    axes[1].set(xticks=range(len(rows)), xticklabels=[f"{d}, {k}, {r:g}" for d, k, r in SETTINGS], ylabel="share, given that RTN fails")
    axes[1].tick_params(axis="x", rotation=60, labelsize=8)
    axes[1].set(xlabel="d, k, r", ylim=(0, 1.25))
    axes[1].legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    save(figure, "toy_codimension.svg")
    for r in rows:
        print(f"d {r[0]}, k {r[1]}, r {r[2]}: predicted {r[3]:.2f}, counted {r[5]:.2f}, exists {r[7]:.3f} (Poisson {r[4]:.3f})", end="; ")
        print(f"RTN fails: exists {r[11]:.3f}, STE {r[13]:.3f}")


def row(rng: np.random.Generator, dim: int, k: int, half_width: float) -> tuple[object, ...]:
    counts, rtn = [], []
    for _ in range(DRAWS):
        w = rng.uniform(-0.5, 0.5, dim)
        valley = Valley(unit_normals(rng, k, dim), w, half_width)
        counts.append(len(valley.corners(w)))
        rtn.append(valley.inside(valley.rtn(w)))
    predicted = 2**dim * pi ** (k / 2) / gamma(k / 2 + 1) * half_width**k / (2 * pi / 3) ** (k / 2)
    exists, entered = [], []
    for valley, w in outside(rng, FAILURES, k, dim, half_width):
        exists.append(len(valley.corners(w)) > 0)
        entered.append(valley.ste(w, lr=LR, steps=STEPS).first_entry is not None)
    of_these = np.array(entered)[exists]
    return (
        *(dim, k, half_width, predicted, 1 - np.exp(-predicted), *mean(counts), *share(np.array(counts) > 0), *share(rtn)),
        *(*share(exists), *share(entered), *(share(of_these) if len(of_these) > 1 else (None, None))),
    )


if __name__ == "__main__":
    main()
