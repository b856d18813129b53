"""Figure: the loss along straight lines from the float weights to rounded and trained ones. Is there a flat floor and a wall?

Left: increase along float -> RTN over its end value, where RTN fails; dashed lines are powers 2 and 8. Middle: fitted power of every line.
Right: float -> QAT and RTN -> QAT at RTN failures. S(1) - S(0) over S(.5) - S(0) is 4 for a quadratic; a floor with a wall gives much more.
Three shapes with two numbers each are fitted to a line by least squares: a power c a^p, a floor with a linear wall c max(0, a - a0), and a
floor with a quadratic wall. BatchNorm statistics are frozen along a line. Writes results/profiles_shape.svg, profiles_shape.csv and
profiles_fits.csv. Skipped where results/profiles.csv is not there.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from evidence import ARCHITECTURES, GROUPS, TOLERANCE, Row, interval, key, legend, numbers, of_group
from shared import GREY, Array, save, write

POSITIONS = np.arange(16) / 10
LINES = {"rtn": "float -> RTN", "gptq": "float -> GPTQ", "qat": "float -> QAT", "rtn-qat": "RTN -> QAT"}
SMALL = 0.01  # nat: a barrier or a fall of this size is seen


def main() -> None:
    rows = numbers("profiles.csv")
    if not rows:
        return
    bad = {key(row) for row in rows if row["line"] == "rtn" and rise(row)[10] > TOLERANCE}
    rows = [row for row in rows if key(row) in bad]
    table = []
    for group in GROUPS:
        for name in LINES:
            mine = [row for row in of_group(rows, group) if row["line"] == name]
            if mine:
                table.append(summary(group, name, mine))
                print(f"{group}, {LINES[name]}: power {table[-1][3]:.2f} ({table[-1][4]:.2f} to {table[-1][5]:.2f}) of {len(mine)} lines")
    shape = (
        "power_median",
        "low",
        "high",
        "power_10",
        "power_90",
        "powers_fitted",
        "ratio_median",
        "ratio_low",
        "ratio_high",
        "ratio_10",
        "ratio_90",
        "ratios",
    )
    write("profiles_shape.csv", ("group", "line", "lines", *shape, "barriers", "falls", "largest_barrier", "largest_fall"), table)
    write_fits(rows)
    draw(rows)


def rise(row: Row) -> Array:
    """Return S(a) - S(0) at 0, .1, ..., 1.5."""
    return np.array([row[f"S{a:g}"] for a in POSITIONS]) - row["S0"]


def power(row: Row) -> float:
    """Return the fitted power; NaN where the line does not end above its start, or dips below it first."""
    return float(row["exponent"]) if rise(row)[10] > SMALL else np.nan


def doubling(row: Row) -> float:
    """Return S(1) - S(0) over S(.5) - S(0); NaN where one of them is not above the start."""
    values = rise(row)
    return float(values[10] / values[5]) if values[10] > SMALL and values[5] > 0 else np.nan


def median(of: Callable[[Row], float]) -> Callable[[Sequence[Row]], float]:
    def found(rows: Sequence[Row]) -> float:
        values = np.array([of(row) for row in rows])
        return float(np.median(values[~np.isnan(values)])) if (~np.isnan(values)).any() else np.nan

    return found


def summary(group: str, name: str, rows: list[Row]) -> tuple[object, ...]:
    powers = np.array([power(row) for row in rows])
    ratios = np.array([doubling(row) for row in rows])
    fitted, ratios = powers[~np.isnan(powers)], ratios[~np.isnan(ratios)]
    spread, wide = (np.percentile(values, (10, 90)) if len(values) else (np.nan, np.nan) for values in (fitted, ratios))
    barriers, falls = np.array([row["barrier"] for row in rows]), np.array([row["defect"] for row in rows])
    ends: tuple[object, ...] = (int((barriers > SMALL).sum()), int((falls > SMALL).sum()), barriers.max(), falls.max())
    return (
        group,
        name,
        len(rows),
        *interval(rows, median(power)),
        *spread,
        len(fitted),
        *interval(rows, median(doubling)),
        *wide,
        len(ratios),
        *ends,
    )


def fits(row: Row) -> dict[str, tuple[float, float]]:
    """Return shape -> (its second number, root mean square residual over the increase at the end)."""
    values = rise(row)[:11]
    a, found = POSITIONS[:11], {}
    shapes = {
        "power": (np.linspace(0.3, 12, 235), lambda p: a**p),
        "linear wall": (np.linspace(0, 0.95, 96), lambda a0: np.maximum(0, a - a0)),
        "quadratic wall": (np.linspace(0, 0.95, 96), lambda a0: np.maximum(0, a - a0) ** 2),
    }
    for name, (grid, shape) in shapes.items():
        basis = np.array([shape(x) for x in grid])
        scale = basis @ values / (basis**2).sum(1)
        errors = np.sqrt(((values - scale[:, None] * basis) ** 2).mean(1)) / values[10]
        best = int(errors.argmin())
        found[name] = (float(grid[best]), float(errors[best]))
    return found


def write_fits(rows: list[Row]) -> None:
    """Write, per group, how well each shape fits float -> RTN, which fits best, and how wide the floors are."""
    table = []
    for group in GROUPS:
        mine = [fits(row) for row in of_group(rows, group) if row["line"] == "rtn"]
        for name in mine[0] if mine else ():
            best = sum(min(one, key=lambda shape, one=one: one[shape][1]) == name for one in mine)  # type: ignore[misc]
            second, errors = np.array([one[name] for one in mine]).T
            table.append((group, name, len(mine), best, *np.percentile(errors, (50, 90)), *np.percentile(second, (50, 10, 90))))
            print(f"{group}: {name} fits best in {best} of {len(mine)}, residual {table[-1][4]:.3f}, number {table[-1][6]:.2f}")
    header = ("group", "shape", "lines", "best_in", "residual_median", "residual_90", "p_or_a0_median", "p_or_a0_10", "p_or_a0_90")
    write("profiles_fits.csv", header, table)


def draw(rows: list[Row]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8))
    a = POSITIONS[:11]
    for row in rows:
        colour = ARCHITECTURES[row["architecture"]]
        if row["line"] == "rtn":
            axes[0].plot(a, rise(row)[:11] / rise(row)[10], color=colour, linewidth=0.5, alpha=0.6)
        elif row["line"] in ("qat", "rtn-qat"):
            axes[2].plot(a, rise(row)[:11], color=colour, linewidth=0.5, alpha=0.8, linestyle="-" if row["line"] == "qat" else ":")
    for p in (2, 8):
        axes[0].plot(a, a**p, color="black", linewidth=1.5, linestyle="--")
    axes[0].set(xlabel="position on float -> RTN", ylabel="increase / increase at RTN", title="where RTN fails (dashed: powers 2, 8)")
    shown = [name for name in ARCHITECTURES if of_group(rows, name)]
    for k, name in enumerate(shown):
        for j, line in enumerate(("rtn", "gptq")):
            values = [power(row) for row in of_group(rows, name) if row["line"] == line]
            places = k + 0.3 * j + np.linspace(-0.1, 0.1, len(values))
            axes[1].plot(places, values, "o^"[j], color=ARCHITECTURES[name], markersize=3)
    axes[1].axhline(2, color=GREY, linewidth=0.7)
    axes[1].set(xticks=range(len(shown)), ylabel="fitted power", title="dots: to RTN, triangles: to GPTQ")
    axes[1].set_xticklabels(shown, rotation=30, fontsize=8)
    axes[2].axhline(0, color=GREY, linewidth=0.7)
    axes[2].set(xlabel="position", ylabel="increase from the start, nat", yscale="symlog", title="float -> QAT (lines), RTN -> QAT (dots)")
    axes[2].set_yscale("symlog", linthresh=0.1)
    legend(axes[0], shown)
    save(figure, "profiles_shape.svg")


if __name__ == "__main__":
    main()
