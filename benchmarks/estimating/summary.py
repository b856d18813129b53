"""Summary: from single runs to one table and one figure. Running it does nothing.

Intervals are 95 % of Student's distribution over seeds, of differences that are paired by seed: with three seeds, 4.3 standard errors.
"""

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

from estimating.methods import ALL, FLOAT, FLOAT_BITS, NVFP4, TAUGHT, Arm
from estimating.runs import SEEDS, Run, Table

ROUNDED, DEFAULT = "rtn, absmax", "default"
LINEAR = 0.005  # nats, around zero, where a logarithmic axis has no place for what lies below full precision
MARKS = (-LINEAR, 0.0, LINEAR, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Row(NamedTuple):
    """One method at one width, test part; nats per byte.

    Attributes:
        rate: the chosen one; 0 where nothing is trained.
        seeds: how many.
        loss: of the weights rounded to nearest, mean over seeds.
        residual: that loss above its control's, and the half width of its 95 % interval, paired by seed.
        share: of the gap from absmax rounding to full precision that is closed; soft at 2 bits, where rounding alone ruins the model.
        over_default: loss above the default's, and the half width of its interval; NaN for the default itself.
        rr, latent: mean loss under randomized rounding, and of the latent weights, above the control's.
        levels: most levels in a block.
        seconds: of one core per run.
    """

    method: str
    kind: str
    grid: str
    bits: float
    rate: float
    seeds: int
    loss: float
    residual: float
    residual_interval: float
    share: float
    over_default: float
    over_default_interval: float
    rr: float
    latent: float
    levels: int
    seconds: float


def summarise(table: Table, everyone: Mapping[str, Arm]) -> list[Row]:
    """Return the rows of every method whose reported runs are there, by width and then in the order of the arms."""
    rows = []
    for bits in (FLOAT_BITS, *ALL):
        for name, arm in everyone.items():
            runs = table.reported(name, bits, arm)
            against = TAUGHT if arm.teacher else FLOAT
            control = table.reported(against, FLOAT_BITS, everyone[against])
            if len(runs) < 2 or not _paired(runs, control):
                continue
            rounded, default = (table.reported(one, bits, everyone[one]) for one in (ROUNDED, DEFAULT))
            rows.append(_row(name, arm, runs, (control, rounded, default)))
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the table, and print it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([f"{value:.5g}" if isinstance(value, float) else value for value in row] for row in rows)
    print(f"{'bits':>4} {'method':<26} {'grid':<18} {'rate':>7} {'loss':>8} {'residual':>16} {'share':>7} {'over default':>17} {'RR':>8}")
    for row in rows:
        residual, over = (
            f"{a:.4f} ± {b:.4f}" for a, b in ((row.residual, row.residual_interval), (row.over_default, row.over_default_interval))
        )
        numbers = f"{row.rate:>7.2g} {row.loss:>8.4f} {residual:>16} {row.share:>7.1%} {over:>17} {row.rr:>8.4f}"
        print(f"{row.bits:>4g} {row.method:<26} {row.grid:<18} {numbers}")


def read(path: Path) -> list[Row]:
    """Return the rows of a written table."""
    kinds = Row.__annotations__
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def titled(bits: float) -> str:
    """Return what a width is called."""
    return "NVFP4" if bits == NVFP4 else f"INT{bits:g}"


def document(rows: Sequence[Row], path: Path) -> None:
    """Write one table per width between the marks of a page, best first."""
    parts = []
    for bits in sorted({row.bits for row in rows if row.kind != "control"}, reverse=True):
        shown = sorted((row for row in rows if row.bits == bits), key=lambda row: (row.method.endswith("teacher"), row.residual))
        lines = [
            f"**{titled(bits)}**",
            "",
            "| method | codes | rate | above full precision | gap closed | above the default | RR above full precision |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in shown:
            name = {"ours": f"**{row.method}**", "peer": f"*{row.method}*"}.get(row.kind, row.method)
            name += "" if row.seeds == len(SEEDS) else f" ({row.seeds} seeds)"
            over = (
                ""
                if math.isnan(row.over_default) or row.method.endswith("teacher")
                else f"{row.over_default:+.4f} ± {row.over_default_interval:.4f}"
            )
            numbers = [
                f"{row.residual:.4f} ± {row.residual_interval:.4f}",
                _share(row.share),
                over,
                "" if math.isnan(row.rr) else f"{row.rr:.3f}",
            ]
            lines.append(" | ".join([f"| {name}", row.grid, f"{row.rate:.2g}" if row.rate else "", *numbers]) + " |")
        parts.append("\n".join(lines))
    pattern = re.compile(r"(<!-- table[^>]*-->\n).*?(\n<!-- /table -->)", re.DOTALL)
    text = path.read_text()
    path.write_text(pattern.sub(lambda found: found[1] + "\n\n".join(parts) + found[2], text))


def _share(share: float) -> str:
    """Return a share as text, none where absmax rounding was not measured."""
    return "" if math.isnan(share) else f"{abs(share) if abs(share) < 5e-4 else share:.1%}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the residuals of every width, best at the top, with their intervals."""
    import matplotlib.pyplot as plt

    widths = sorted({row.bits for row in rows if row.kind != "control"}, reverse=True)
    if not widths:
        return
    plt.rcParams["svg.hashsalt"] = "stepwell"
    colours = {"ours": "#1f4e8c", "peer": "#b5651d", "method": "#777777", "rounded": "#bbbbbb"}
    columns = 2 if len(widths) > 3 else len(widths)
    drawn, axes = plt.subplots(
        -(-len(widths) // columns), columns, figsize=(4.6 * columns, 5.4 * -(-len(widths) // columns)), squeeze=False
    )
    for axis in axes.flat[len(widths) :]:
        axis.set_visible(False)
    for bits, axis in zip(widths, axes.flat, strict=False):
        shown = sorted((row for row in rows if row.bits == bits), key=lambda row: -row.residual)
        for place, row in enumerate(shown):
            axis.errorbar(row.residual, place, xerr=row.residual_interval, fmt="o", color=colours[row.kind], capsize=2)
        axis.set_yticks(range(len(shown)), [row.method for row in shown], fontsize=8)
        _logarithmic(axis, shown)
        axis.set_title(titled(bits))
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    drawn.supxlabel(
        "Left is better. Blue: the default; brown: other libraries; grey: the library's other methods; light: rounded after training. "
        "Bars: 95 %.",
        fontsize=8,
    )
    drawn.tight_layout()
    drawn.savefig(path, metadata={"Date": None})
    plt.close(drawn)


def _logarithmic(axis: Any, rows: Sequence[Row]) -> None:
    """Set a logarithmic axis, which is linear around zero where a residual may be below it."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    label = "nats per byte above full precision"
    if min(row.residual - row.residual_interval for row in rows) > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = axis.get_xlim()
        axis.set_xscale("symlog", linthresh=LINEAR, linscale=0.6)
        axis.xaxis.set_major_locator(FixedLocator([mark for mark in MARKS if low <= mark <= high]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axvline(0, color="#444444", linewidth=0.8)
        label += f"\n(linear below {LINEAR:g})"
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_xlabel(label)


def _row(name: str, arm: Arm, runs: Sequence[Run], rivals: tuple[Sequence[Run], Sequence[Run], Sequence[Run]]) -> Row:
    """Return the row of one method; `rivals` are its control, absmax rounding and the default."""
    control, rounded, default = rivals
    loss, floor = mean(run.rtn for run in runs), mean(run.rtn for run in control)
    residual, interval = paired(runs, control)
    over, over_interval = paired(runs, default) if name != DEFAULT and _paired(runs, default) else (math.nan, math.nan)
    gap = mean(run.rtn for run in rounded) - floor if len(rounded) > 1 else math.nan

    def above(value: Callable[[Run], float]) -> float:
        return mean(value(run) for run in runs) - floor

    codes = "blocks of 16" if runs[0].bits == NVFP4 else arm.grid
    return Row(
        name, arm.kind, codes, runs[0].bits, runs[0].rate, len(runs), loss, residual, interval, 1 - residual / gap, over, over_interval,
        above(lambda run: run.rr), above(lambda run: run.latent), max(run.levels for run in runs), mean(run.seconds for run in runs),
    )  # fmt: skip


def paired(runs: Sequence[Run], others: Sequence[Run]) -> tuple[float, float]:
    """Return the mean difference of losses by seed, and the half width of its 95 % interval."""
    by_seed = {run.seed: run.rtn for run in others}
    differences = [run.rtn - by_seed[run.seed] for run in runs]
    return mean(differences), float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5


def _paired(runs: Sequence[Run], others: Sequence[Run]) -> bool:
    """Say whether every run has its counterpart."""
    return len(runs) > 1 and {run.seed for run in runs} <= {run.seed for run in others}
