"""Figure: first entry is not permanence. Share of the steps after first entry that the deployed point spends in the basin.

16 dimensions, one random normal, r = 0.3, wall slope 1, lr 0.02, 1500 steps; the rest of the loss is nothing, a quadratic h I around the
start, or a river slope a. Starts that RTN leaves outside (shown), and any start. Also the share of the second half of the run, which
depends less on the start, and how far the last deployed loss lies above the best one seen.
Writes results/toy_stay.svg and toy_stay.csv.
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREEN, Array, mean, outside, save, unit_normals, write

from stepwell.theory import Valley

DIM, HALF_WIDTH, LR, STEPS, DRAWS = 16, 0.3, 0.02, 1500, 80
SETTINGS: dict[str, dict[str, object]] = {
    "flat": {},
    "H = 0.01 I": {"hessian": 0.01 * np.eye(DIM)},
    "H = 0.1 I": {"hessian": 0.1 * np.eye(DIM)},
    "H = 0.5 I": {"hessian": 0.5 * np.eye(DIM)},
    "river slope 0.1": {"river_slope": 0.1},
    "river slope 0.5": {"river_slope": 0.5},
}


def main() -> None:
    rng = np.random.default_rng(25)
    starts = {"RTN outside": outside(rng, DRAWS, 1, DIM, HALF_WIDTH), "any": [anywhere(rng) for _ in range(DRAWS)]}
    rows, stays = [], []
    for start, cases in starts.items():
        for name, options in SETTINGS.items():
            found = np.array([one(replace(valley, **options), w) for valley, w in cases])  # type: ignore[arg-type]
            found = found[~np.isnan(found[:, 0])]
            stay = found[:, 0]
            rows.append((start, name, len(found), DRAWS, *mean(stay), float(np.median(stay)), *mean(found[:, 1]), *mean(found[:, 2])))
            stays.append(stay)
            print(f"{start}, {name}: entered {len(found)}; stay {rows[-1][4]:.3f} ± {rows[-1][5]:.3f}, second half {rows[-1][7]:.3f}")
    header = (
        "start",
        "loss",
        "entered",
        "runs",
        "stay",
        "stay_se",
        "median",
        "second_half",
        "second_half_se",
        "last_minus_best",
        "last_se",
    )
    write("toy_stay.csv", header, rows)
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    shown = len(SETTINGS)
    axis.boxplot(
        stays[:shown], tick_labels=list(SETTINGS), whis=(5, 95), showfliers=False, medianprops={"color": BROWN}, boxprops={"color": BLUE}
    )
    axis.plot(np.arange(1, shown + 1), [row[4] for row in rows[:shown]], "o", color=GREEN, label="mean")
    axis.set(ylabel="share of later steps in the basin", ylim=(0, 1.05), title="d = 16, r = 0.3, lr 0.02 (box: quartiles, 5 to 95 %)")
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(frameon=False, fontsize=8)
    save(figure, "toy_stay.svg")


def anywhere(rng: np.random.Generator) -> tuple[Valley, Array]:
    w = rng.uniform(-0.5, 0.5, DIM)
    return Valley(unit_normals(rng, 1, DIM), w, HALF_WIDTH), w


def one(valley: Valley, w: Array) -> tuple[float, float, float]:
    """Return the stay fraction, that of the second half, and how far the last deployed loss lies above the best; nan for no entry."""
    run = valley.ste(w, lr=LR, steps=STEPS)
    if run.stay is None:
        return (np.nan,) * 3
    losses = np.asarray(valley.loss(run.points))
    return run.stay, float(run.inside[STEPS // 2 :].mean()), float(losses[-1] - losses.min())


if __name__ == "__main__":
    main()
