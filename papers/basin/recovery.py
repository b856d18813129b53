"""Figure: which way does QAT recover? Loss of deployed and of latent weights along the run, and where the latent weights end.

R1 of the toy moves latent weights towards the river, R2 moves them away from it to offset their rounding. Where RTN fails: left, deployed
and latent increase at logged steps (learning rate 1e-3), median over configurations; middle, both at the end; right, the cosine between the
latent displacement and minus the rounding error (above 0: offsets it), over the rise of the latent loss. Weights are never clipped to the
grid's range here, but a grid that does not reach the largest weights moves the deployed point by itself: the loss of the clipped float
weights stands beside. Writes results/recovery.svg, recovery.csv (summary) and recovery_steps.csv. Skipped where tables are missing.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, TOLERANCE, Row, failed, interval, key, legend, networks, numbers, of_group, runs
from shared import BLUE, BROWN, GREY, save, write

LEAST = 1e-3


def main() -> None:
    logged, ends, rows = numbers("inward.csv"), {key(row): row for row in numbers("latents.csv")}, runs()
    if not (logged and ends and rows):
        return
    paths = {
        one: sorted((row for row in logged if key(row) == one), key=lambda row: row["k"]) for one in {key(row) for row in failed(rows)}
    }
    rows = [end(row, ends[key(row)], paths[key(row)]) for row in failed(rows) if key(row) in ends and paths[key(row)]]
    statistics: dict[str, Callable[[Sequence[Row]], float]] = {
        "L(w) > L(q) at the end, share": of(lambda row: row["latent_loss"] > row["deployed_loss"]),
        "L(w) > L(q), of recovered": of(lambda row: row["latent_loss"] > row["deployed_loss"], recovered),
        "L(w) > L(q) where clipping w_fp alone costs below 0.01": of(
            lambda row: row["latent_loss"] > row["deployed_loss"], lambda row: row["clipped_loss"] - row["start"] < 0.01
        ),
        "L(w) outside the tolerance, of recovered": of(lambda row: row["latent_loss"] - row["start"] > TOLERANCE, recovered),
        "cosine with minus the rounding error > 0, share": of(lambda row: row["compensation"] > 0),
        "cosine with minus the rounding error, median": of(lambda row: row["compensation"], middle=True),
        "|q_q - w_fp| > |q_0 - w_fp|, share": of(lambda row: row["distance"] > row["rounded_distance"]),
        "clipping w_fp alone costs more than the tolerance, share": of(lambda row: row["clipped_loss"] - row["start"] > TOLERANCE),
        "recovered, share": of(recovered),
        "ever within the tolerance at a logged step, share": of(lambda row: row["first"] >= 0),
        "first logged step within, median": of(lambda row: row["first"], lambda row: row["first"] >= 0, middle=True),
        "left again at a later logged step, of entered": of(lambda row: row["left"], lambda row: row["first"] >= 0),
        "deployed loss fell while latent loss rose, share": of(lambda row: row["opposed"]),
        "codes changed, median": of(lambda row: row["changed"], middle=True),
        "codes within one step of RTN, least": lambda mine: min(row["near"] for row in mine),
    }
    table = []
    for group in GROUPS:
        mine = of_group(rows, group)
        for name, statistic in statistics.items():
            if mine:
                table.append((group, len(networks(mine)), len(mine), name, *interval(mine, statistic)))
                print(f"{group}: {name} {table[-1][4]:.3f} ({table[-1][5]:.3f} to {table[-1][6]:.3f})")
    write("recovery.csv", ("group", "networks", "rtn_failures", "statistic", "value", "low", "high"), table)
    steps = along(rows, paths)
    write("recovery_steps.csv", ("group", "k", "configurations", "deployed_median", "latent_median", "outside_share"), steps)
    draw(rows, steps)


def end(row: Row, latent: Row, path: list[Row]) -> Row:
    """Return a configuration with D7 at the end of the run, and what its log says about entry."""
    inside = [not one["outside"] for one in path]
    first = inside.index(True) if any(inside) else None
    opposed = path[-1]["loss"] < path[0]["loss"] and path[-1]["latent_loss"] > path[0]["latent_loss"]
    more = {"first": -1.0 if first is None else path[first]["k"], "left": first is not None and not all(inside[first:]), "opposed": opposed}
    return row | {name: value for name, value in latent.items() if name != "loss"} | {"deployed_loss": latent["loss"]} | more


def recovered(row: Row) -> bool:
    return bool(row["qat"] <= TOLERANCE)


def of(
    value: Callable[[Row], float], keep: Callable[[Row], bool] = lambda row: True, *, middle: bool = False
) -> Callable[[Sequence[Row]], float]:
    """Return the mean, or the median, of a value over the rows that count."""

    def found(rows: Sequence[Row]) -> float:
        values = [float(value(row)) for row in rows if keep(row)]
        return float(np.median(values) if middle else np.mean(values)) if values else np.nan

    return found


def along(rows: list[Row], paths: dict[tuple[str, str, float], list[Row]]) -> list[tuple[object, ...]]:
    table = []
    for group in GROUPS:
        logs = [one for row in of_group(rows, group) for one in paths[key(row)]]
        for k in sorted({one["k"] for one in logs}):
            mine = [one for one in logs if one["k"] == k]
            middle = [float(np.median([one[name] - one["start"] for one in mine])) for name in ("loss", "latent_loss")]
            table.append((group, k, len(mine), *middle, float(np.mean([one["outside"] for one in mine]))))
    return table


def draw(rows: list[Row], steps: list[tuple[object, ...]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8))
    for group, style in zip(GROUPS[1:], ("-", "--", ":"), strict=True):
        mine = [[row[1], row[3], row[4]] for row in steps if row[0] == group]
        if not mine:
            continue
        k, deployed, latent = np.array(mine, dtype=float).T
        axes[0].plot(k + 1, deployed, style, color=BLUE, label=f"{group}, deployed")
        axes[0].plot(k + 1, latent, style, color=BROWN, label=f"{group}, latent")
    axes[0].axhline(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
    axes[0].set(xscale="log", xlabel="steps + 1", ylabel="median increase, nat", title="where RTN fails")
    axes[0].legend(frameon=False, fontsize=7)
    for name, colour in ARCHITECTURES.items():
        mine = of_group(rows, name)
        rise = [[max(row[x] - row["start"], LEAST) for row in mine] for x in ("deployed_loss", "latent_loss")]
        axes[1].plot(*rise, ".", color=colour, markersize=5)
        axes[2].plot(rise[1], [row["compensation"] for row in mine], ".", color=colour, markersize=5)
    ends = np.array(axes[1].get_xlim())
    axes[1].plot(ends, ends, color=GREY, linewidth=0.7)
    axes[1].set(xscale="log", yscale="log", xlabel="deployed increase at the end, nat", ylabel="latent increase at the end, nat")
    axes[2].axhline(0, color=GREY, linewidth=0.7)
    axes[2].set(xscale="log", xlabel="latent increase at the end, nat", ylabel="cosine with minus the rounding error")
    legend(axes[1], [name for name in ARCHITECTURES if of_group(rows, name)])
    save(figure, "recovery.svg")


if __name__ == "__main__":
    main()
