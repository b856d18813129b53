"""Figure: does a grid-to-basin ratio near 1 mark where rounding fails?

Left and middle: RTN increase against the ratio for uniform noise and against the ratio of one width per network (rho_fn). Right: area under
the ROC curve for failures of RTN, GPTQ and QAT. rho_self is a tautology (it is above 1 exactly where RTN fails, for a line that only rises)
and is shown as such; rho_cross shares the direction of another rounding of the same network. Failures of GPTQ and QAT with BatchNorm are
those of re-estimated statistics, ratios those of frozen ones; RTN is scored both ways.
Writes results/ratio.svg, ratio.csv (areas, and accuracy at the natural threshold), ratio_gray_zone.csv, ratio_difference.csv (areas
compared on the same networks) and ratio_quadratic.csv (the quadratic proxy over the true increase). Skipped where results/runs.csv is not
there.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, TOLERANCE, Row, auc, interval, legend, of_group, runs, wilson
from scipy.stats import spearmanr
from shared import GREY, save, write

RATIOS = {"rho_self": 1.0, "rho_uniform": 1.0, "rho_fn": 1.0, "rho_cross": 1.0, "quadratic": TOLERANCE, "minus_bits": np.nan}
NAMES = ("rho_self (tautology)", "rho_uniform", "rho_fn", "rho_cross", "quadratic proxy", "bits alone")
FAILURES = {"rtn_frozen": "RTN", "rtn": "RTN, settled", "gptq": "GPTQ", "qat": "QAT"}
REFERENCE = "minus_bits"


def main() -> None:
    rows = [row | {"minus_bits": -row["bits"]} for row in runs()]
    if not rows:
        return
    table = [line(of_group(rows, g), g, few, method, ratio) for g in GROUPS for few in (0, 1) for method in FAILURES for ratio in RATIOS]
    header = ("group", "only_4_bits_or_fewer", "failure_of", "ratio", "configurations", "failures", "auc", "low", "high")
    accuracy = ("threshold", "accuracy", "accuracy_low", "accuracy_high", "false_alarms", "misses")
    write("ratio.csv", (*header, *accuracy), [row for row in table if row])
    zones = [zone(of_group(rows, g), g, ratio) for g in GROUPS for ratio in list(RATIOS)[:-1] if of_group(rows, g)]
    header = ("group", "ratio", "largest_without_failure", "smallest_with_failure", "best_threshold", "best_accuracy", "spearman")
    write("ratio_gray_zone.csv", header, zones)
    write("ratio_difference.csv", ("failure_of", "ratio", "auc_minus_bits_alone", "low", "high"), differences(rows))
    write_quadratic(rows)
    draw(rows, [row for row in table if row])


def write_quadratic(rows: list[Row]) -> None:
    """Write, per group and bits, the quadratic proxy over the true increase where RTN fails: below 1 it underestimates."""
    table = []
    for group in GROUPS:
        for bits in (0, 4, 3, 2):
            mine = [row for row in of_group(rows, group) if row["rtn_frozen"] > TOLERANCE and bits in (0, row["bits"])]
            if mine:
                over = np.array([row["quadratic"] / row["rtn_frozen"] for row in mine])
                middle = interval(mine, lambda found: float(np.median([row["quadratic"] / row["rtn_frozen"] for row in found])))
                below = int((over < 1).sum())
                table.append((group, bits or "all", len(mine), *middle, below, over.min(), over.max()))
                print(f"{group}, {bits or 'all'} bits: quadratic over true {middle[0]:.2f}, below 1 in {below} of {len(mine)}")
    write("ratio_quadratic.csv", ("group", "bits", "rtn_failures", "median", "low", "high", "below_1", "least", "most"), table)


def chosen(rows: Sequence[Row], few: int) -> list[Row]:
    return [row for row in rows if row["bits"] <= 4 or not few]


def area(method: str, ratio: str) -> Callable[[Sequence[Row]], float]:
    """Return the area under the ROC curve of a ratio for failures of a method, as a function of the rows."""

    def of(rows: Sequence[Row]) -> float:
        value, bad = np.array([row[ratio] for row in rows]), np.array([row[method] > TOLERANCE for row in rows])
        return auc(value[bad], value[~bad])

    return of


def line(rows: list[Row], group: str, few: int, method: str, ratio: str) -> tuple[object, ...]:
    mine = chosen(rows, few)
    if not mine:
        return ()
    bad, alarm = np.array([row[method] > TOLERANCE for row in mine]), np.array([row[ratio] > RATIOS[ratio] for row in mine])
    right = int((bad == alarm).sum())
    found = interval(mine, area(method, ratio))
    scored: tuple[object, ...] = (
        RATIOS[ratio],
        right / len(mine),
        *wilson(right, len(mine)),
        int((alarm & ~bad).sum()),
        int((bad & ~alarm).sum()),
    )
    if np.isnan(RATIOS[ratio]):
        scored = (None,) * len(scored)
    if group == "all":
        where = "4 bits or fewer" if few else "all bits"
        print(f"{where}, {method}, {ratio}: AUC {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f}), accuracy {scored[1]}")
    return group, few, FAILURES[method], ratio, len(mine), int(bad.sum()), *found, *scored


def zone(rows: list[Row], group: str, ratio: str) -> tuple[object, ...]:
    """Return where failures of RTN begin and successes end, and the best single threshold in hindsight."""
    value, increase = np.array([row[ratio] for row in rows]), np.array([row["rtn_frozen"] for row in rows])
    bad = increase > TOLERANCE
    accuracy = [float(((value > t) == bad).mean()) for t in value]
    best = int(np.argmax(accuracy))
    ends = (value[~bad].max() if (~bad).any() else np.nan, value[bad].min() if bad.any() else np.nan)
    return group, ratio, *map(float, ends), float(value[best]), accuracy[best], float(spearmanr(value, increase).statistic)


def differences(rows: list[Row]) -> list[tuple[object, ...]]:
    """Return how much more area a ratio has than bits alone, both on the same drawn networks."""
    table = []
    for method, name in FAILURES.items():
        for ratio in ("rho_uniform", "rho_fn", "rho_cross", "quadratic"):
            better = [area(method, one) for one in (ratio, REFERENCE)]
            table.append((name, ratio, *interval(rows, lambda mine, pair=better: pair[0](mine) - pair[1](mine))))  # type: ignore[misc]
    return table


def draw(rows: list[Row], table: list[tuple[object, ...]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9))
    for axis, ratio in zip(axes, ("rho_uniform", "rho_fn"), strict=False):
        for name, colour in ARCHITECTURES.items():
            mine = of_group(rows, name)
            axis.plot([row[ratio] for row in mine], [max(row["rtn_frozen"], 1e-4) for row in mine], ".", color=colour, markersize=5)
        axis.axhline(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
        axis.axvline(1, color=GREY, linewidth=0.7, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel=ratio, ylabel="RTN increase, nat (least 0.0001)")
    legend(axes[0], [name for name in ARCHITECTURES if of_group(rows, name)])
    shown = {name: [row for row in table if row[:3] == ("all", 0, name)] for name in ("RTN", "GPTQ", "QAT")}
    for k, (name, mine) in enumerate(shown.items()):
        place = np.arange(len(NAMES)) + 0.2 * (k - 1)
        value, low, high = np.array([row[6:9] for row in mine], dtype=float).T
        axes[2].errorbar(value, place, xerr=np.abs([value - low, high - value]), fmt="o", markersize=4, label=f"failure of {name}")
    axes[2].set(yticks=range(len(NAMES)), yticklabels=NAMES, xlabel="area under the ROC curve", xlim=(0.5, 1.01))
    axes[2].invert_yaxis()
    axes[2].legend(frameon=False, fontsize=8)
    save(figure, "ratio.svg")


if __name__ == "__main__":
    main()
