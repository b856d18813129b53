"""Figure: is there a low-loss grid point one step or less from RTN, and does a search over flips carry over to other data?

Where RTN fails: box QAT keeps every code within one step of RTN's, at the budget of QAT; the search over flips uses validation data and is
judged on test data. A point that is found is a proof that it exists; one that is not found proves nothing.
Writes results/near_points.svg, near_points.csv (per configuration) and near_points_summary.csv. Skipped where results/neighbours.csv or
results/runs.csv is not there.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, TOLERANCE, Row, failed, interval, key, legend, median_removed, networks, numbers, of_group, runs
from shared import GREY, save, write

LEAST = 1e-3  # nat, on logarithmic axes


def main() -> None:
    searched, rows = numbers("neighbours.csv"), runs()
    if not searched or not rows:
        return
    found = {name: {key(row): row for row in searched if row["search"] == name} for name in ("box", "flip")}
    rows = [joined(row, found) for row in failed(rows) if key(row) in found["box"] and key(row) in found["flip"]]
    columns = ("rtn", "qat", "qat_heldout", "box", "box_heldout", "flip", "flip_heldout", "changed_qat", "changed_box", "changed_flip")
    write("near_points.csv", ("network", "scheme", "bits", *columns), [(*key(row), *(row[name] for name in columns)) for row in rows])
    table = []
    statistics: dict[str, Callable[[Sequence[Row]], float]] = {
        "found by any, share": lambda mine: float(np.mean([best(row) <= TOLERANCE for row in mine])),
        "box QAT / QAT, median": lambda mine: float(np.median([row["box"] / row["qat"] for row in mine if row["qat"] > 0.02] or [np.nan])),
        "box QAT - QAT, median": lambda mine: float(np.median([row["box"] - row["qat"] for row in mine])),
        "box QAT - QAT held out, median": lambda mine: float(np.median([row["box_heldout"] - row["qat_heldout"] for row in mine])),
        "removed by box QAT, median": median_removed("box"),
        "removed by flips, median": median_removed("flip"),
        "flips, held-out minus search increase, median": lambda mine: float(np.median([row["flip_heldout"] - row["flip"] for row in mine])),
        "QAT, held-out minus validation increase, median": lambda mine: float(np.median([row["qat_heldout"] - row["qat"] for row in mine])),
    }
    for group in GROUPS:
        mine = of_group(rows, group)
        for name, statistic in statistics.items():
            if mine:
                table.append((group, len(networks(mine)), len(mine), name, *interval(mine, statistic)))
                print(f"{group}, {len(mine)} failures of RTN: {name} {table[-1][4]:.3f} ({table[-1][5]:.3f} to {table[-1][6]:.3f})")
    write("near_points_summary.csv", ("group", "networks", "rtn_failures", "statistic", "value", "low", "high"), table)
    draw(rows)


def joined(row: Row, found: dict[str, dict[tuple[str, str, float], Row]]) -> Row:
    """Return a row with both searches' increases beside QAT's."""
    more: Row = {"changed_qat": row["changed"]}
    for name, table in found.items():
        one = table[key(row)]
        more |= {name: one["increase"], f"{name}_heldout": one["increase_heldout"], f"changed_{name}": one["changed"]}
    return row | more


def best(row: Row) -> float:
    """Return the smallest increase of a point that is known to lie within a step of RTN."""
    return float(min(row["box"], row["flip"], *([row["qat"]] if row["within_one"] == 1 else [])))


def draw(rows: list[Row]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8))
    pairs = (
        ("qat", "box", "QAT", "box QAT"),
        ("qat", "flip", "QAT", "flips"),
        ("flip", "flip_heldout", "flips, on the data searched", "held out"),
    )
    for axis, (x, y, label_x, label_y) in zip(axes, pairs, strict=True):
        for name, colour in ARCHITECTURES.items():
            mine = of_group(rows, name)
            axis.plot([max(row[x], LEAST) for row in mine], [max(row[y], LEAST) for row in mine], ".", color=colour, markersize=5)
        ends = (LEAST, max(max(row[x], row[y]) for row in rows))
        axis.plot(ends, ends, color=GREY, linewidth=0.7)
        for line in (axis.axhline, axis.axvline):
            line(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel=f"{label_x}: increase, nat", ylabel=f"{label_y}: increase, nat")
    axes[0].set_title(f"{len(rows)} configurations where RTN fails")
    legend(axes[0], [name for name in ARCHITECTURES if of_group(rows, name)])
    save(figure, "near_points.svg")


if __name__ == "__main__":
    main()
