"""What the figures on networks share: tables as numbers, groups, failures, and intervals that resample networks. Running it does nothing.

Configurations of one network are correlated, so every interval draws networks with replacement and keeps all rows of each; a group of two
networks has no honest interval and gets its range instead. A method fails where its validation loss exceeds the float network's by more
than the tolerance.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binomtest
from shared import BLUE, BROWN, GREEN, GREY, RED, Array, read

TOLERANCE, MIDDLE_RATE, DRAWS = 0.1, 1e-3, 500
ARCHITECTURES = {"digits-mlp": BLUE, "digits-deep": BROWN, "digits-cnn": GREEN, "bytes-lm": RED, "cifar-bn": GREY}
GROUPS = ("all", "digits", "bytes-lm", "cifar-bn")
SCHEMES = ("tensor-mse", "channel-mse", "tensor-absmax")
Row = dict[str, Any]


def numbers(name: str) -> list[Row]:
    """Return the rows of a table, with numbers where there are numbers; an empty field is NaN."""
    rows: list[Row] = [{key: number(value) for key, value in row.items()} for row in read(name)]
    for row in rows:
        row["architecture"] = row["network"].rpartition("-")[0]
    return rows


def number(value: str) -> float | str:
    try:
        return float(value or "nan")
    except ValueError:
        return value


def at_rate(rows: Sequence[Row], rate: float = MIDDLE_RATE) -> list[Row]:
    """Return the rows of one learning rate: a configuration each."""
    return [row for row in rows if np.isclose(row["rate"], rate)]


def runs() -> list[Row]:
    """Return one row per network, scheme and bits: runs.csv at the middle rate, with what probes.csv and lotion.csv add.

    LOTION was not run everywhere on the large networks: NaN there.
    """
    rows = at_rate(numbers("runs.csv"))
    if not rows:
        return []
    more = {key(row): row for row in numbers("probes.csv")}
    lotion = {key(row): row for row in numbers("lotion.csv") if row["scales"] == "frozen"}
    none = dict.fromkeys(("lotion", "lotion_se", "lotion_heldout"), np.nan)
    return [{**more[key(row)], **lotion.get(key(row), none), **row} for row in rows]


def key(row: Row) -> tuple[str, str, float]:
    return row["network"], row["scheme"], row["bits"]


def failed(rows: Sequence[Row], method: str = "rtn") -> list[Row]:
    """Return the rows in which a method's increase exceeds the tolerance."""
    return [row for row in rows if row[method] > TOLERANCE]


def of_group(rows: Sequence[Row], group: str) -> list[Row]:
    """Return the rows of a group of networks: "all", "digits", or an architecture."""
    return [row for row in rows if group == "all" or row["architecture"].startswith(group)]


def networks(rows: Sequence[Row]) -> list[str]:
    return sorted({row["network"] for row in rows})


def interval(rows: Sequence[Row], statistic: Callable[[Sequence[Row]], float], *, seed: int = 0) -> tuple[float, float, float]:
    """Return a statistic and its 95 % interval over networks drawn with replacement; of fewer than three networks the range of their own.

    Draws in which the statistic does not exist are left out.
    """
    by_network = {name: [row for row in rows if row["network"] == name] for name in networks(rows)}
    if not by_network:
        return (np.nan,) * 3
    value = statistic(rows)
    if len(by_network) < 3:
        single = [one for one in map(statistic, by_network.values()) if not np.isnan(one)]
        return value, min(single, default=np.nan), max(single, default=np.nan)
    rng, names = np.random.default_rng(seed), list(by_network)
    draws = np.array(
        [statistic([row for i in rng.integers(len(names), size=len(names)) for row in by_network[names[i]]]) for _ in range(DRAWS)]
    )
    draws = draws[~np.isnan(draws)]
    return (value, *map(float, np.percentile(draws, (2.5, 97.5)))) if len(draws) else (value, np.nan, np.nan)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share, as if all rows were independent."""
    if not count:
        return np.nan, np.nan
    found = binomtest(hits, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def auc(positive: Array, negative: Array) -> float:
    """Return the probability that a positive is larger than a negative, ties half; NaN without one of the two."""
    if not len(positive) or not len(negative):
        return np.nan
    difference = np.asarray(positive)[:, None] - np.asarray(negative)
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def removed(rows: Sequence[Row], method: str) -> Array:
    """Return the share of the RTN increase that a method removes, per row."""
    return np.array([1 - row[method] / row["rtn"] for row in rows])


def median_removed(method: str) -> Callable[[Sequence[Row]], float]:
    return lambda rows: float(np.median(removed(rows, method))) if rows else np.nan


def legend(axis: plt.Axes, names: Sequence[str]) -> None:
    """Give the colours of the architectures."""
    handles = [plt.Line2D([], [], color=ARCHITECTURES[name], marker="o", markersize=4, linestyle="") for name in names]
    axis.legend(handles, names, frameon=False, fontsize=8)
