"""Figure: does float training with the budget of QAT, followed by rounding, give what QAT gives?

Where RTN fails, at every learning rate that was tried: increase after rounding, with the scales of the float weights that training began
with and with refitted ones, against QAT's at the same rate. Also against the loss of the float weights trained on, because training on
lowers the loss of unconverged networks by itself. Writes results/control_budget.svg and control_budget.csv. Skipped where tables are
missing.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, TOLERANCE, Row, failed, interval, key, legend, median_removed, networks, numbers, of_group
from shared import GREY, save, write

LEAST = 1e-3
METHODS = {"control": "frozen scales", "refitted": "refitted scales", "qat": "QAT"}


def main() -> None:
    controls, rows = numbers("controls.csv"), failed(numbers("runs.csv"))
    if not controls or not rows:
        return
    by_run = {(*key(row), row["rate"]): row for row in controls}
    rows = [row | {name: by_run[(*key(row), row["rate"])][name] for name in ("trained", "refitted", "refitted_heldout")} for row in rows]
    table = []
    for group in GROUPS:
        for rate in sorted({row["rate"] for row in rows}):
            mine = [row for row in of_group(rows, group) if row["rate"] == rate]
            for method, label in METHODS.items():
                if mine:
                    within = interval(mine, lambda found, name=method: float(np.mean([row[name] <= TOLERANCE for row in found])))  # type: ignore[misc]
                    against = interval(mine, above_trained(method))
                    counts = (len(networks(mine)), len(mine))
                    table.append((group, f"{rate:g}", *counts, label, *within, *interval(mine, median_removed(method)), *against))
                    print(f"{group}, rate {rate:g}, {label}: within {within[0]:.2f}, removed {table[-1][8]:.2f} of {len(mine)}")
    names = ("within", "removed_median", "above_trained_float_median")
    columns = [column for name in names for column in (name, f"{name}_low", f"{name}_high")]
    write("control_budget.csv", ("group", "rate", "networks", "rtn_failures", "method", *columns), table)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9))
    for axis, name in zip(axes, ("control", "refitted"), strict=True):
        for architecture, colour in ARCHITECTURES.items():
            mine = of_group(rows, architecture)
            axis.plot([max(row["qat"], LEAST) for row in mine], [max(row[name], LEAST) for row in mine], ".", color=colour, markersize=4)
        ends = np.array([LEAST, max(row[name] for row in rows)])
        axis.plot(ends, ends, color=GREY, linewidth=0.7)
        for line in (axis.axhline, axis.axvline):
            line(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="QAT: increase, nat", ylabel="float training, then RTN: increase, nat")
        axis.set_title(METHODS[name])
    legend(axes[0], [name for name in ARCHITECTURES if of_group(rows, name)])
    save(figure, "control_budget.svg")


def above_trained(method: str) -> Callable[[Sequence[Row]], float]:
    """Return the median increase over the float weights that were trained on with the same budget."""
    return lambda rows: float(np.median([row[method] - row["trained"] for row in rows])) if rows else np.nan


if __name__ == "__main__":
    main()
