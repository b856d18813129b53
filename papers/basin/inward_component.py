"""Figure: does the gradient at the quantized weights point back to the float weights, and does it tell inside from outside?

Points are logged at 0, 1, 2, 4, ... steps of QAT (learning rate 1e-3) and at its end. c_q and c_w are cosines of the descent direction at
deployed and latent weights with the way back from the deployed ones; p_q is the fall of the loss per unit on it. On a convex slice c_q is
positive everywhere: its sign alone shows no wall. A random direction has a cosine of about one over the root of the number of weights.
"Sane" leaves out points whose loss is above that of guessing, log 10 or log 256; "without ternary absmax" leaves out the grids whose
weights are nearly all zero. Both were added after the first look: on these points the loss has levelled off.
Writes results/inward_component.svg and inward_component.csv. Skipped where results/inward.csv is not there.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, Row, auc, interval, legend, networks, numbers, of_group
from shared import GREY, save, write

Statistic = Callable[[Sequence[Row]], float]
MOMENTS = {"all": lambda row: True, "k = 0": lambda row: row["k"] == 0, "k >= 1": lambda row: row["k"] > 0}
RARE = 4  # bits: at 8 bits nothing is outside


def main() -> None:
    rows = numbers("inward.csv")
    if not rows:
        return
    statistics: dict[str, Statistic] = {
        "c_q>0|out": positive("cosine", 1),
        "c_q>0|in": positive("cosine", 0),
        "c_w>0|out": positive("latent_cosine", 1),
        "c_w>0|in": positive("latent_cosine", 0),
        "c_q>c_w|out": stronger,
        "median_c_q|out": median("cosine", 1),
        "median_c_q|in": median("cosine", 0),
        "median_c_w|out": median("latent_cosine", 1),
        "auc_c_q": told_apart("cosine"),
        "auc_c_w": told_apart("latent_cosine"),
        "auc_p_q": told_apart("projection"),
        "c_q>0|out, sane": lambda mine: positive("cosine", 1)(sane(mine)),
        "auc_p_q, sane": lambda mine: told_apart("projection")(sane(mine)),
        "auc_p_q, without ternary absmax": lambda mine: told_apart("projection")([row for row in mine if not ternary_absmax(row)]),
        "auc_p_q, mean within networks": within_networks,
    }
    table = []
    for group in GROUPS:
        for moment, keep in MOMENTS.items():
            mine = [row for row in of_group(rows, group) if keep(row)]
            counts = (len(mine), int(sum(row["outside"] for row in mine)))
            if mine:
                random = float(np.median([row["random"] for row in mine]))
                table += [(group, moment, *counts, name, *interval(mine, of), random) for name, of in statistics.items()]
    write("inward_component.csv", ("group", "points", "count", "outside", "statistic", "value", "low", "high", "random_cosine"), table)
    for row in table:
        if row[1] == "k >= 1":
            print(f"{row[0]}, {row[3]} of {row[2]} outside, {row[4]}: {row[5]:.3f} ({row[6]:.3f} to {row[7]:.3f})")
    draw(rows)


def ternary_absmax(row: Row) -> bool:
    return bool(row["scheme"] == "tensor-absmax" and row["bits"] == 2)


def within_networks(rows: Sequence[Row]) -> float:
    found = [told_apart("projection")([row for row in rows if row["network"] == name]) for name in networks(rows)]
    return float(np.nanmean(found)) if not np.isnan(found).all() else np.nan


def sane(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["loss"] < np.log(256 if row["architecture"] == "bytes-lm" else 10)]


def of_side(rows: Sequence[Row], name: str, outside: int) -> list[float]:
    return [row[name] for row in rows if row["outside"] == outside and not np.isnan(row[name])]


def positive(name: str, outside: int) -> Statistic:
    def share(rows: Sequence[Row]) -> float:
        values = of_side(rows, name, outside)
        return float(np.mean(np.array(values) > 0)) if values else np.nan

    return share


def median(name: str, outside: int) -> Statistic:
    def found(rows: Sequence[Row]) -> float:
        values = of_side(rows, name, outside)
        return float(np.median(values)) if values else np.nan

    return found


def stronger(rows: Sequence[Row]) -> float:
    """Return the share of outside points where the deployed gradient points back more than the latent one."""
    found = [row["cosine"] > row["latent_cosine"] for row in rows if row["outside"]]
    return float(np.mean(found)) if found else np.nan


def told_apart(name: str) -> Statistic:
    return lambda rows: auc(np.array(of_side(rows, name, 1)), np.array(of_side(rows, name, 0)))


def draw(rows: list[Row]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8))
    later = [row for row in rows if row["k"] > 0 and row["bits"] <= RARE]
    for name, colour in ARCHITECTURES.items():
        for outside, mark in ((1, "x"), (0, ".")):
            mine = [row for row in of_group(later, name) if row["outside"] == outside]
            look = {"marker": mark, "color": colour, "markersize": 4, "alpha": 0.6, "linestyle": ""}
            axes[0].plot([row["latent_cosine"] for row in mine], [row["cosine"] for row in mine], **look)
            height = [max(row["loss"] - row["start"], 1e-3) for row in mine]
            axes[1].plot(height, [max(row["projection"], 1e-4) for row in mine], **look)
    for line in (axes[0].axhline, axes[0].axvline):
        line(0, color=GREY, linewidth=0.7)
    axes[0].set(xlabel="c_w, at the latent weights", ylabel="c_q, at the deployed weights", title="crosses: outside")
    axes[1].set(xscale="log", yscale="log", xlabel="increase of the deployed loss, nat", ylabel="p_q, nat per unit", title="k >= 1")
    legend(axes[0], [name for name in ARCHITECTURES if of_group(rows, name)])
    names = ("c_q", "p_q")
    for k, group in enumerate(group for group in GROUPS if of_group(rows, group)):
        for j, name in enumerate(("cosine", "projection")):
            value, low, high = interval([row for row in of_group(rows, group) if row["k"] > 0], told_apart(name))
            label = group if j == 0 else None
            axes[2].errorbar(
                j + 0.1 * k, value, [[abs(value - low)], [abs(high - value)]], fmt="o", color=f"C{k}", markersize=4, label=label
            )
    axes[2].axhline(0.5, color=GREY, linewidth=0.7)
    axes[2].set(xticks=(0.15, 1.15), xticklabels=names, ylabel="AUC for outside", xlim=(-0.3, 1.8), title="k >= 1")
    axes[2].legend(frameon=False, fontsize=8)
    save(figure, "inward_component.svg")


if __name__ == "__main__":
    main()
