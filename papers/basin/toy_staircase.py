"""Figure: theorem R2, the latent point moves away from the river along the normal until its rounding error is offset.

Left: the staircase n(Q(w + alpha nu)) of a fixed normal in 16 dimensions, and where training enters. Middle: share of runs that enter
against the half-width in units of J / 2, with J the longest move in one step (at 1 and above R2 proves entry). Right: how far the latent
point is from the river at first entry. Random normals, RTN outside, learning rate 0.005. Writes results/toy_staircase.svg,
toy_staircase.csv (per cell) and toy_staircase_rows.csv (the deterministic family).
"""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from shared import BLUE, BROWN, GREEN, GREY, Array, mean, save, share, unit_normals, write

from stepwell.theory import Valley
from stepwell.theory.recovery import jump, largest_rounding

DIMS, MULTIPLES, DRAWS = (16, 64, 256), (1.0, 0.5, 0.25, 0.1), 150
LR, STEPS = 0.005, 3000
ROWS = ((8, 0.25, 0.02), (16, 0.25, 0.02), (16, 0.05, 0.02), (128, 0.1, 0.01))


def main() -> None:
    rng = np.random.default_rng(9012)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    rows = [row_of(*setting) for setting in ROWS]
    header = ("d", "half_width", "lr", "n_rtn", "loss_rtn", "E", "T", "n_entry", "changed", "largest_normal", "bound", "jump", "both_signs")
    write("toy_staircase_rows.csv", header, rows)
    for row in rows:
        print(*row)
    draw_staircase(axes[0])
    cells = [cell(rng, dim, multiple) for dim in DIMS for multiple in MULTIPLES]
    names = ("entered", "rtn_inside", "T_over_bound", "within_one", "latent_distance", "rtn_distance", "J")
    write("toy_staircase.csv", ("d", "multiple", "runs", "violations", *(c for name in names for c in (name, f"{name}_se"))), cells)
    for dim, colour in zip(DIMS, (BLUE, BROWN, GREEN), strict=True):
        mine = np.array([row for row in cells if row[0] == dim])
        axes[1].errorbar(mine[:, 1], mine[:, 4], mine[:, 5], color=colour, marker="o", markersize=3, label=f"d = {dim}")
        axes[1].plot(mine[:, 1], mine[:, 6], ":", color=colour)
        axes[2].errorbar(mine[:, 1], mine[:, 12], mine[:, 13], color=colour, marker="o", markersize=3, label=f"d = {dim}")
    axes[1].set(
        xscale="log", xlabel="half-width / (J / 2)", ylabel="share in the basin", ylim=(0, 1.03), title="STE where RTN fails (dotted: RTN)"
    )
    axes[2].set(xscale="log", xlabel="half-width / (J / 2)", ylabel="latent distance at first entry", ylim=(0, None), title="start: 0")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, "toy_staircase.svg")
    for row in cells:
        print(f"d {row[0]}, {row[1]:g} J/2: entered {row[4]:.3f} of {row[2]}, RTN inside {row[6]:.3f}", end=", ")
        print(f"beyond the bound {row[3]}, T / bound {row[8]:.3f}")


def family(dim: int) -> tuple[Array, Array]:
    """Return the normal and the point of the deterministic family."""
    i = np.arange(1, dim + 1)
    normal = np.sin(0.7 * i**2) + 0.05 * np.cos(3 * i)
    return normal / np.linalg.norm(normal), (0.6180339887498949 * i) % 1 - 0.5


def row_of(dim: int, half_width: float, lr: float) -> tuple[object, ...]:
    normal, w = family(dim)
    valley = Valley([normal], w, half_width)
    run = valley.ste(w, lr=lr, steps=3000)
    n, entry = valley.distance(run.points)[:, 0], run.first_entry
    at_entry = (None, None) if entry is None else (n[entry], int((run.points[entry] != run.points[0]).sum()))
    rounding, late = largest_rounding(normal[None], 1.0), n[-500:]
    return (
        *(dim, half_width, lr, n[0], valley.loss(run.points[0]), rounding, "never" if entry is None else entry, *at_entry),
        *(np.abs(normal).max(), run.bound, run.bounds.jump, int((late > 0).any() and (late < 0).any())),
    )


def cell(rng: np.random.Generator, dim: int, multiple: float) -> tuple[object, ...]:
    """Return the shares of one dimension and half-width over runs that RTN leaves outside."""
    runs: list[Followed] = []
    jumps: list[float] = []
    inside: list[bool] = []
    while len(runs) < DRAWS:
        normal, w = unit_normals(rng, 1, dim), rng.uniform(-0.5, 0.5, dim)
        # sup over the whole range that R2 can reach, and both ways
        reach = largest_rounding(normal, 1.0) + LR
        longest = max(jump(sign * normal[0], w, 1.0, stride=LR, span=reach) for sign in (1.0, -1.0))
        jumps.append(longest)
        valley = Valley(normal, w, multiple * longest / 2)
        inside.append(bool(valley.inside(valley.rtn(w))))
        if not inside[-1]:
            runs.append(follow(valley, w))
    entries = [run for run in runs if run.entry is not None]
    late = sum(run.proven and (run.entry is None or run.entry > run.bound) for run in runs)
    return (
        *(dim, multiple, DRAWS, late, *share([run.entry is not None for run in runs]), *share(inside)),
        *mean([run.entry / run.bound for run in entries]),
        *share([run.within for run in entries]),
        *mean([run.latent for run in entries]),
        *mean([run.deployed for run in runs]),
        *mean(jumps),
    )


class Followed(NamedTuple):
    """One run: first entry, R2's bound, whether entry is proven, whether it is a step or less per coordinate from RTN, and how far from
    the river the latent point was then and RTN before.
    """

    entry: int | None
    bound: int
    proven: bool
    within: bool
    latent: float
    deployed: float


def follow(valley: Valley, w: Array) -> Followed:
    run = valley.ste(w, lr=LR, steps=STEPS)
    at = run.first_entry or 0
    within = bool(np.abs(run.points[at] - run.points[0]).max() <= 1)
    latent, deployed = (float(np.abs(valley.distance(point)[0])) for point in (run.latent[at], run.points[0]))
    assert run.bounds.staircase is not None
    return Followed(run.first_entry, run.bounds.staircase, run.guaranteed, within, latent, deployed)


def draw_staircase(axis: Axes) -> None:
    normal, w = family(16)
    valley = Valley([normal], w, 0.25)
    alpha = np.linspace(0, 0.6, 2401)
    axis.axhspan(-0.25, 0.25, color=GREEN, alpha=0.15, linewidth=0)
    axis.plot(alpha, valley.distance(valley.rtn(w + alpha[:, None] * normal))[:, 0], color=BLUE, label="deployed")
    axis.plot(alpha, alpha, color=GREY, linewidth=1, label="latent")
    run = valley.ste(w, lr=0.02, steps=8)
    assert run.first_entry is not None
    axis.plot(
        0.02 * np.arange(run.first_entry + 1),
        valley.distance(run.points[: run.first_entry + 1])[:, 0],
        "o",
        color=BROWN,
        markersize=3,
        label="STE, lr 0.02",
    )
    axis.set(xlabel="moved along the normal", ylabel="distance across the valley", title="d = 16, r = 0.25")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
