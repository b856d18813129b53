"""What the advisor is made of: runs, a formula in logarithms, and an interval by split conformal prediction. Running it does nothing.

What is known before a run comes from validation data; what is forecast is the increase on held-out data, for which an advisor is asked, and
which is measured on two to four times as many samples. Every network counts the same, however many runs it has. The interval is the 90 %
quantile of the residuals of networks that the formula was not fitted on, pooled with the same mass per network: conformal prediction for
groups, by pooling (Dunn, Wasserman, Ramdas, arXiv:1809.07441), which promises its coverage for many networks only. What it covers here is
measured, on networks left out once more. Measured increases have 90 % intervals as well.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from stepwell.advice.forecast import Coefficients, Estimate, Evidence, Forecast, Trained

FLOOR = 0.003  # nat: below it an increase is noise of the run
REFERENCE = 0.1  # nat: the tolerance at which rho_fn was measured
LEVEL = 0.9  # of every interval
RIDGE = 0.01  # of each standardised feature's variance: RTN, GPTQ and rho_fn say nearly the same
ASKED = 0.05  # nat: a forecast is asked for where GPTQ leaves more than the smallest tolerance that is scored
FORECASTS: dict[str, tuple[str, ...]] = {
    "RTN": ("rho_fn",),
    "GPTQ": ("rho_fn",),
    "train": ("rho_fn", "rate"),
    "probes": ("gptq", "rtn", "rho_fn", "rate"),
    "early": ("early", "gptq", "rho_fn", "rate"),
}
METHODS: dict[str, Trained] = {"RTN": "RTN", "GPTQ": "GPTQ"}  # whose increase a formula gives; the others give training's


class Run(NamedTuple):
    """One training run and what was known before it; increases of the loss, nats."""

    network: str
    architecture: str
    scheme: str
    bits: int
    weights: int
    rate: float
    steps: float
    rtn: float
    rtn_se: float
    rtn_heldout: float
    gptq: float
    gptq_se: float
    gptq_heldout: float
    rho_fn: float
    d20: float
    d5: float
    d10: float
    qat: float
    qat_heldout: float


def parsed(rows: Iterable[Mapping[str, str]]) -> list[Run]:
    """Return the runs of a table; a number that is empty or missing is NaN."""

    def field(row: Mapping[str, str], name: str, kind: type) -> object:
        return kind(row.get(name) or "nan") if kind is float else kind(row[name])

    return [Run(*(field(row, name, kind) for name, kind in Run.__annotations__.items())) for row in rows]  # type: ignore[arg-type]


def evidence(run: Run, *, measured: bool = True, early: bool = False) -> Evidence:
    """Return what the advisor would see of a run: what was measured on validation data, with its interval."""
    if not measured:
        return Evidence(run.rho_fn, run.rate)
    rtn, gptq = _measured("RTN", run.rtn, run.rtn_se), _measured("GPTQ", run.gptq, run.gptq_se)
    return Evidence(run.rho_fn, run.rate, rtn, gptq, run.d10 if early else None)


def increase(name: str, run: Run) -> float:
    """Return the increase that a formula forecasts: on held-out data."""
    return {"RTN": run.rtn_heldout, "GPTQ": run.gptq_heldout}.get(name, run.qat_heldout)


def usable(name: str, runs: Iterable[Run]) -> list[Run]:
    """Return the runs that a formula can be fitted on: rounding costs something, and nothing that it needs is missing."""
    rows = [run for run in runs if run.rtn > FLOOR and (name != "early" or math.isfinite(run.d10))]
    return [run for run in rows if math.isfinite(increase(name, run))]


def asked(name: str, runs: Iterable[Run]) -> list[Run]:
    """Return the runs for which a forecast is asked: all for the formulas of the width alone, for the others where GPTQ is not enough."""
    return [run for run in runs if name in ("RTN", "GPTQ", "train") or run.gptq > ASKED]


def formulas(runs: Sequence[Run]) -> Coefficients:
    """Return all formulas, fitted on these runs and no others, with their intervals; whole intervals decide, nothing is scored."""
    spans = {name: np.array([getattr(run, name) for run in runs], float) for name in ("rate", "steps", "weights", "rho_fn")}
    return Coefficients(
        floor=FLOOR,
        tolerance=REFERENCE,
        forecasts={name: forecast(name, runs) for name in FORECASTS},
        ranges={name: (float(np.nanmin(span)), float(np.nanmax(span))) for name, span in spans.items()},
        shares=dict.fromkeys(("width", "probes", "early"), 1.0),
        scores=(),
        provenance={"networks": sorted({run.network for run in runs}), "rows": len(runs)},
    )


def forecast(name: str, runs: Sequence[Run]) -> Forecast:
    """Return one formula with the factor of its interval, which comes from fits that leave one network out."""
    return fit(name, runs)._replace(factor=math.exp(quantile(residuals(name, runs))))


def fit(name: str, runs: Sequence[Run]) -> Forecast:
    """Return the ridge fit of a formula in logarithms, every network with the same weight; its interval is not known yet."""
    rows, features = usable(name, runs), FORECASTS[name]
    x = np.array([[math.log(seen(name, run)[feature]) for feature in features] for run in rows])
    y = np.log([max(increase(name, run), FLOOR) for run in rows])
    mass = masses(rows)
    centre, level = mass @ x, mass @ y
    spread = np.sqrt(mass @ (x - centre) ** 2)
    z = (x - centre) / np.where(spread > 0, spread, 1)
    powers = np.linalg.solve(z.T @ (mass[:, None] * z) + RIDGE * np.eye(len(features)), z.T @ (mass * (y - level)))
    powers = powers / np.where(spread > 0, spread, 1)
    return Forecast(
        METHODS.get(name, "train"), float(level - centre @ powers), dict(zip(features, map(float, powers), strict=True)), math.nan
    )


def seen(name: str, run: Run) -> dict[str, float]:
    """Return a run's features as the library computes them."""
    bare = Coefficients(FLOOR, REFERENCE, {}, {}, {}, (), {})
    return bare.features(evidence(run, measured=name in ("probes", "early"), early=name == "early"))


def residuals(name: str, runs: Sequence[Run]) -> list[tuple[Run, float]]:
    """Return every run that is asked for, with log(measured / forecast) by a fit without its network."""
    found = []
    for _, others, mine in left_out(runs, "network"):
        tested = asked(name, usable(name, mine))
        if tested and usable(name, others):
            formula = fit(name, others)
            found += [(run, residual(name, formula, run)) for run in tested]
    return found


def residual(name: str, formula: Forecast, run: Run) -> float:
    """Return log(measured / forecast) of one run."""
    return math.log(max(increase(name, run), FLOOR)) - math.log(formula(seen(name, run), FLOOR).increase)


def left_out(runs: Sequence[Run], split: str) -> Iterator[tuple[str, list[Run], list[Run]]]:
    """Yield every network (or architecture) with the runs of all others and with its own."""
    for name in sorted({getattr(run, split) for run in runs}):
        yield name, [run for run in runs if getattr(run, split) != name], [run for run in runs if getattr(run, split) == name]


def quantile(found: Sequence[tuple[Run, float]]) -> float:
    """Return the absolute residual below which `LEVEL` of the mass lies, every network with the same mass."""
    if not found:
        return math.inf
    sizes = np.abs([one for _, one in found])
    order = np.argsort(sizes)
    place = int(np.searchsorted(np.cumsum(masses([run for run, _ in found])[order]), LEVEL - 1e-12))
    return float(sizes[order[min(place, len(order) - 1)]])


def masses(rows: Sequence[Run]) -> np.ndarray:
    """Return weights that sum to 1 and are the same for every network."""
    counts: dict[str, int] = {}
    for run in rows:
        counts[run.network] = counts.get(run.network, 0) + 1
    return np.array([1 / (len(counts) * counts[run.network]) for run in rows])


def _measured(method: Trained, value: float, error: float) -> Estimate:
    """Return an increase measured on hundreds of samples, where Student's law is the normal one."""
    margin = error * NormalDist().inv_cdf((1 + LEVEL) / 2)
    return Estimate(method, value, value - margin, value + margin, True)
