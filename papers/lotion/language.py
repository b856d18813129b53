"""Table and figure: a byte language model at INT4, INT3, INT2 and NVFP4, rounded to nearest and at random.

The runs are those of `python benchmarks/estimators.py`: one base, 250 steps, rates chosen on validation data, three seeds on test data;
blocks of 64, NVFP4 blocks of 16 with e4m3 scales rounded up. Nothing is trained here. In nats per byte above full precision with the same
steps and data, paired by seed, with the 95 % interval of that difference. Writes results/language.csv and language.svg; seconds.
"""

import matplotlib.pyplot as plt
import numpy as np
from lab import SEEDS, control
from shared import BLUE, BROWN, ROOT, interval, read, save, write

GRIDS = {"INT4": "4", "INT3": "3", "INT2": "2", "NVFP4": "4.5"}  # 4 bits and an 8-bit scale per 16 weights
SHOWN = ("rtn, absmax", "rtn, searched scales", "gptq, searched scales", "ste", "sampled", "lotion", "ste + lotion", "coupled")
SHOWN = (*SHOWN, "prox", "ste + prox", "default")


def table() -> list[dict[str, object]]:
    """Return a row per grid and method that has all its seeds, at the rate that validation data chose."""
    results = ROOT / "benchmarks" / "results"
    runs, rates = (
        read(results / "estimators.csv"),
        {(row["method"], row["bits"]): row["rate"] for row in read(results / "estimators_table.csv")},
    )
    rows: list[dict[str, object]] = []
    for grid, bits in GRIDS.items():
        for method in SHOWN:
            rate = float(rates.get((method, bits), "nan"))
            mine = [
                run for run in runs if (run["method"], run["bits"], run["split"]) == (method, bits, "test") and float(run["rate"]) == rate
            ]
            if {int(run["seed"]) for run in mine} >= set(SEEDS):
                rows.append({"grid": grid, "method": method, "rate": rate, "seeds": len(mine)} | above(mine))
    return rows


def above(mine: list[dict[str, str]]) -> dict[str, object]:
    """Return what a method loses to full precision to nearest and at random, and the latter over the former."""
    values = {key: [float(run[key]) - control()[int(run["seed"])] for run in mine if run[key] not in ("", "nan")] for key in ("rtn", "rr")}
    found: dict[str, object] = {}
    for key, losses in values.items():
        found[key], found[f"{key}_interval"] = interval(losses) if len(losses) == len(mine) else (None, None)
    return found


def draw(rows: list[dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, len(GRIDS), figsize=(12, 3.6), sharey=True)
    there = {row["method"] for row in rows}
    order = [method for method in SHOWN[::-1] if method in there]
    for axis, grid in zip(axes, GRIDS, strict=True):
        for key, colour, label, lift in (("rtn", BLUE, "to nearest", 0.14), ("rr", BROWN, "at random", -0.14)):
            mine = [row for row in rows if row["grid"] == grid and row[key] is not None]
            values, half = ([float(row[name]) for row in mine] for name in (key, f"{key}_interval"))  # type: ignore[arg-type]
            place = np.array([order.index(str(row["method"])) for row in mine]) + lift
            axis.errorbar(values, place, xerr=half, fmt="o", markersize=3, color=colour, label=label)
        axis.set(title=grid, xlabel="nats per byte above full precision")
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(min(0.0, axis.get_xlim()[0]), None)  # the default ends below full precision at 4 bits
        axis.axvline(0, color="#888888", linewidth=0.6)
        axis.set_yticks(range(len(order)), order, fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, "language.svg")


def main() -> None:
    rows = table() if control() else []
    if not rows:
        print("skipped: `python benchmarks/estimators.py` comes first")
        return
    write("language.csv", rows)
    draw(rows)
    for row in rows:
        rr = "" if row["rr"] is None else f" / {row['rr']:.4f} ± {row['rr_interval']:.4f}"
        print(f"{row['grid']:<6} {row['method']:<22} rate {row['rate']:<7} {row['rtn']:.4f} ± {row['rtn_interval']:.4f}{rr}")


if __name__ == "__main__":
    main()
