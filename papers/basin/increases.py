"""Figure: what rounding costs, and what is left of it after each method, per architecture, scheme and bits.

Held-out increase over the float network, mean over the two networks of an architecture; QAT and the float control at learning rate 1e-3.
Tables: failures per method and bits, with the gap between RTN and QAT; median share of the RTN increase that each method removes where RTN
fails, and how often it ends within the tolerance; LOTION against QAT, at the rate and strength of `measures.py`, with frozen scales and
with absmax scales that follow the weights. Writes results/increases.svg, increases.csv (every mean), increases_failures.csv,
increases_removed.csv and increases_lotion.csv. Skipped where results/runs.csv is not there.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, SCHEMES, TOLERANCE, Row, failed, interval, key, median_removed, numbers, of_group, runs, wilson
from shared import BLUE, BROWN, GREEN, GREY, RED, save, write

METHODS = {
    "rtn": ("RTN", GREY),
    "search": ("scale search", BROWN),
    "gptq": ("GPTQ", RED),
    "lotion": ("LOTION", GREEN),
    "qat": ("QAT", BLUE),
    "control": ("float training, then RTN", "black"),
}
BITS = (8, 4, 3, 2)
CLEAR = 0.01  # nat


def main() -> None:
    rows = runs()
    if not rows:
        return
    means = []
    architectures = [name for name in ARCHITECTURES if of_group(rows, name)]
    figure, axes = plt.subplots(
        len(SCHEMES), len(architectures), figsize=(2.5 * len(architectures), 7.5), sharex=True, sharey=True, squeeze=False
    )
    for line, scheme in zip(axes, SCHEMES, strict=True):
        for axis, architecture in zip(line, architectures, strict=True):
            mine = [row for row in rows if row["scheme"] == scheme and row["architecture"] == architecture]
            means += panel(axis, mine, scheme, architecture)
            axis.set(xticks=range(len(BITS)), xticklabels=BITS)
            axis.set_yscale("symlog", linthresh=0.01)
            axis.axhline(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
        line[0].set_ylabel(f"{scheme}\nheld-out increase, nat")
    for axis, architecture in zip(axes[0], architectures, strict=True):
        axis.set_title(architecture)
    for axis in axes[-1]:
        axis.set_xlabel("bits")
    axes[0, 0].legend(frameon=False, fontsize=6, loc="upper left")
    axes[0, 0].set_ylim(-0.1, 100)
    save(figure, "increases.svg")
    columns = [column for method in METHODS for column in (method, f"{method}_heldout", f"{method}_heldout_spread")]
    write("increases.csv", ("architecture", "scheme", "bits", "networks", *columns), means)
    write_failures(rows)
    write_removed(rows)
    write_lotion(rows)


def panel(axis: plt.Axes, rows: list[Row], scheme: str, architecture: str) -> list[tuple[object, ...]]:
    """Draw one architecture and scheme; return the means, and half the distance between the networks."""
    table: list[tuple[object, ...]] = []
    bits = [b for b in BITS if any(row["bits"] == b for row in rows)]
    for b in bits:
        mine = [row for row in rows if row["bits"] == b]
        values = [(np.mean([row[m] for row in mine]), [row[f"{m}_heldout"] for row in mine]) for m in METHODS]
        table.append((architecture, scheme, b, len(mine), *(x for v, h in values for x in (v, np.mean(h), np.ptp(h) / 2))))
    for k, (label, colour) in enumerate(METHODS.values()):
        places = [BITS.index(row[2]) for row in table]  # type: ignore[arg-type]
        axis.plot(places, [row[5 + 3 * k] for row in table], color=colour, marker="o", markersize=3, linewidth=1, label=label)
    return table


def write_failures(rows: list[Row]) -> None:
    """Write, per group and bits, how many configurations fail under each method, and QAT's median advantage, held out.

    The advantage over RTN holds what training on gives by itself; the advantage over the float control, as long trained, does not.
    """
    table: list[tuple[object, ...]] = []
    for group in GROUPS:
        for b in BITS:
            mine = [row for row in of_group(rows, group) if row["bits"] == b]
            if mine:
                fails = [len(failed(mine, name)) for name in ("rtn", "gptq", "qat", "control")]
                gaps = [interval(mine, gap_to(name)) for name in ("rtn", "control")]
                table.append((group, b, len(mine), *fails, *gaps[0], *gaps[1]))
                print(f"{group}, {b} bits: RTN fails in {fails[0]}, GPTQ {fails[1]}, QAT {fails[2]} of {len(mine)}", end="; ")
                print(f"gap to RTN {gaps[0][0]:.3f}, to the control {gaps[1][0]:.3f}")
    gap = [f"{name}_{end}" for name in ("rtn_minus_qat", "control_minus_qat") for end in ("median", "low", "high")]
    names = ("rtn_fails", "gptq_fails", "qat_fails", "control_fails", *gap)
    write("increases_failures.csv", ("group", "bits", "configurations", *names), table)


def gap_to(method: str) -> Callable[[Sequence[Row]], float]:
    return lambda rows: float(np.median([row[f"{method}_heldout"] - row["qat_heldout"] for row in rows]))


def write_removed(rows: list[Row]) -> None:
    """Write, per group and method, the median share removed among RTN failures, with an interval over networks, and recoveries."""
    table = []
    for group in GROUPS:
        failures = failed(of_group(rows, group))
        for method, (label, _) in METHODS.items():
            mine = [row for row in failures if not np.isnan(row[method])]
            if method == "rtn" or not mine:
                continue
            within = sum(row[method] <= TOLERANCE for row in mine)
            worse = sum(row[method] > row["rtn"] for row in mine)
            share = interval(mine, median_removed(method))
            better = sum(row[f"{method}_heldout"] < row["qat_heldout"] - CLEAR for row in mine)
            table.append((group, label, len(mine), *share, within, *wilson(within, len(mine)), worse, better))
            print(f"{group}, {label}: removes {share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f}), within {within} of {len(mine)}")
    header = ("group", "method", "rtn_failures", "removed_median", "low", "high", "within", "within_low", "within_high")
    write("increases_removed.csv", (*header, "worse_than_rtn", "better_than_qat_held_out"), table)


def write_lotion(rows: list[Row]) -> None:
    """Write how often LOTION or QAT is better by more than `CLEAR` held out, and the median difference, where RTN fails."""
    bad, table = {key(row) for row in failed(rows)}, []
    measured = [row for row in numbers("lotion.csv") if key(row) in bad]
    for group in GROUPS:
        for scales in ("frozen", "refitted"):
            mine = [row for row in of_group(measured, group) if row["scales"] == scales]
            if not mine:
                continue
            difference = np.array([row["lotion_heldout"] - row["ste_heldout"] for row in mine])
            wins = (int((difference < -CLEAR).sum()), int((difference > CLEAR).sum()))
            middle = interval(mine, lambda found: float(np.median([row["lotion_heldout"] - row["ste_heldout"] for row in found])))
            table.append((group, scales, len(mine), *wins, *middle))
            print(f"{group}, {scales} scales: LOTION better in {wins[0]}, QAT in {wins[1]} of {len(mine)}")
    write(
        "increases_lotion.csv",
        ("group", "scales", "rtn_failures", "lotion_better", "qat_better", "difference_median", "low", "high"),
        table,
    )


if __name__ == "__main__":
    main()
