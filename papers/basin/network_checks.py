"""Table: what an earlier study measured on digits (other seeds, one to three networks each), and what the networks here give.

Deep and plain networks on digits, 240 steps at the learning rate 1e-3, tolerance 0.1; the column `all` has every network of this folder.
Writes results/network_checks.csv. Skipped where results/runs.csv is not there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from evidence import TOLERANCE, Row, auc, failed, key, median_removed, numbers, runs
from shared import write

CHECKED = ("digits-mlp", "digits-deep")


class Check(NamedTuple):
    """A quantity, what was measured before, what is accepted, and how it is found."""

    name: str
    before: str
    low: float
    high: float
    of: Callable[[Sequence[Row]], float]


def main() -> None:
    rows = runs()
    if not rows:
        return
    boxes = {key(row): row["increase"] for row in numbers("neighbours.csv") if row["search"] == "box"}
    rows = [row | {"box": boxes.get(key(row), np.nan)} for row in rows]
    points = numbers("inward.csv")
    checks: list[tuple[Check, list[Row]]] = [(check, rows) for check in ON_RUNS] + [(check, points) for check in ON_POINTS]
    table = []
    for check, source in checks:
        value = check.of([row for row in source if row["architecture"] in CHECKED])
        held = bool(check.low <= value <= check.high)
        table.append((check.name, check.before, check.low, check.high, value, "yes" if held else "no", check.of(source)))
        print(
            f"{check.name}: {value:.3f} (before {check.before}, accepted {check.low:g} to {check.high:g}): {'holds' if held else 'FAILS'}"
        )
    write("network_checks.csv", ("check", "before", "accept_low", "accept_high", "here", "holds", "all"), table)


def share(keep: Callable[[Row], bool], hit: Callable[[Row], bool]) -> Callable[[Sequence[Row]], float]:
    """Return the share of hits among the rows that count."""

    def found(rows: Sequence[Row]) -> float:
        values = [hit(row) for row in rows if keep(row)]
        return float(np.mean(values)) if values else np.nan

    return found


def at_failures(of: Callable[[Sequence[Row]], float]) -> Callable[[Sequence[Row]], float]:
    return lambda rows: of(failed(rows))


def deep(row: Row) -> bool:
    return bool(row["architecture"] == "digits-deep" and row["bits"] == 3)


def fails(row: Row) -> bool:
    return bool(row["rtn"] > TOLERANCE)


def outside_later(row: Row) -> bool:
    return bool(row["outside"] and row["k"] > 0)


def largest_at_8(rows: Sequence[Row]) -> float:
    return max(abs(row["rtn"]) for row in rows if row["bits"] == 8)


def deep_ratio(rows: Sequence[Row]) -> float:
    values = [row["qat"] / row["rtn"] for row in rows if deep(row) and row["scheme"] == "channel-mse"]
    return float(np.mean(values))


def box_ratio(rows: Sequence[Row]) -> float:
    return float(np.median([row["box"] / row["qat"] for row in rows if row["qat"] > 0]))


def least_within(rows: Sequence[Row]) -> float:
    return min((row["within_one"] for row in rows), default=np.nan)


def projection_area(rows: Sequence[Row]) -> float:
    later = [row for row in rows if row["k"] > 0]
    return auc(*(np.array([row["projection"] for row in later if row["outside"] == side]) for side in (1, 0)))


def uniform_area(rows: Sequence[Row]) -> float:
    return auc(*(np.array([row["rho_uniform"] for row in rows if fails(row) is bad]) for bad in (True, False)))


INF = float("inf")
ON_RUNS = (
    Check("8 bits: largest |RTN increase|", "<= .006", 0, 0.02, largest_at_8),
    Check("deep, 3 bits: RTN fails, share", "9/9", 8 / 9, 1, share(deep, fails)),
    Check("deep, per channel, 3 bits: QAT / RTN increase", ".06", -INF, 0.25, deep_ratio),
    Check("RTN failures: share removed by QAT, median", ".91", 0.75, INF, at_failures(median_removed("qat"))),
    Check("RTN failures: box QAT / QAT increase, median", "1.00", 0.8, 1.3, at_failures(box_ratio)),
    Check(
        "RTN failures: float training + RTN within tolerance, share", "0/38", 0, 0.05, share(fails, lambda row: row["control"] <= TOLERANCE)
    ),
    Check("RTN failures: share removed by float training + RTN, median", "-.05", -INF, 0.2, at_failures(median_removed("control"))),
    Check("AUC of rho_uniform for RTN failure", ".99", 0.93, 1, uniform_area),
    Check("accuracy of rho_uniform > 1", ".95", 0.85, 1, share(lambda row: True, lambda row: (row["rho_uniform"] > 1) == fails(row))),
    Check(
        "recovered failures: L(w_q) > L(q_q), share",
        "23/23",
        0.8,
        1,
        share(lambda row: fails(row) and row["qat"] <= TOLERANCE, lambda row: row["latent"] > row["qat"]),
    ),
    Check("RTN failures: codes within one step of RTN after QAT, least", ">= .994", 0.97, 1, at_failures(least_within)),
)
ON_POINTS = (
    Check("c_q > 0 given outside, k >= 1", "1.00", 0.95, 1, share(outside_later, lambda row: row["cosine"] > 0)),
    Check("c_w > 0 given outside, k >= 1", ".44", 0, 0.75, share(outside_later, lambda row: row["latent_cosine"] > 0)),
    Check("AUC of p_q for outside, k >= 1", ".91", 0.8, 1, projection_area),
)


if __name__ == "__main__":
    main()
