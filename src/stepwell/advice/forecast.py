"""What probes say about the loss after rounding or training, fitted on finished runs: log increase = a + sum of c_k log x_k.

The coefficients are in `coefficients.json`, which `papers/basin/advisor.py` fits and scores; the runs are those of `papers/basin`. Symbols:
x_k = RTN and GPTQ increases of the loss, the increase after an early part of a training run, rho_fn, the learning rate. Increases and
rho_fn are floored before the logarithm, and an increase below the floor counts as the floor.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

Tier = Literal["width", "probes", "early"]  # one width and no more; RTN and GPTQ measured; a tenth of the training run as well
Trained = Literal["RTN", "GPTQ", "train"]
FILE = "coefficients.json"
FAR = 10.0  # times a tolerance that was judged: beyond, a forecast says nothing
LARGEST = 1e6  # an increase that is infinite, or nearly, enters as this


class Estimate(NamedTuple):
    """The increase of the loss that a method leaves.

    Attributes:
        method: "RTN", "GPTQ" or "train".
        increase: in units of the loss.
        low, high: its 90 % interval.
        measured: by evaluating the model; otherwise forecast.
    """

    method: Trained
    increase: float
    low: float
    high: float
    measured: bool

    def narrowed(self, share: float) -> "Estimate":
        """Return the estimate with a part of its interval, on the scale on which its error was found: a forecast's is a factor.

        >>> Estimate("GPTQ", 0.25, 0.0, 0.5, True).narrowed(0.5)[2:4], Estimate("train", 0.25, 0.0, 1.0, False).narrowed(0.5)[2:4]
        ((0.125, 0.375), (0.125, 0.5))
        """
        value, low, high = self.increase, self.low, self.high
        if share == 1 or not math.isfinite(value):
            return self
        if self.measured:
            return self._replace(low=value - share * (value - low), high=value + share * (high - value))
        factor = (high / value) ** share
        return self._replace(low=value / factor, high=value * factor)


class Evidence(NamedTuple):
    """What is known about one grid before a verdict.

    Attributes:
        rho: rho_fn at the tolerance of the fit (`Coefficients.tolerance`).
        rate: learning rate of the training run that is forecast.
        rtn, gptq: as measured; None where nothing was.
        early: increase of the loss at the rounded weights after a tenth of the training run; None without one.
    """

    rho: float
    rate: float
    rtn: Estimate | None = None
    gptq: Estimate | None = None
    early: float | None = None


class Forecast(NamedTuple):
    """One fitted formula.

    Attributes:
        method: whose increase it gives.
        intercept: a.
        powers: feature -> c.
        factor: the 90 % interval is the prediction divided and multiplied by it.
    """

    method: Trained
    intercept: float
    powers: Mapping[str, float]
    factor: float

    def __call__(self, features: Mapping[str, float], floor: float) -> Estimate:
        """Return the increase and its interval; a `low` of 0 stands for everything below the floor."""
        log = self.intercept + sum(power * math.log(features[name]) for name, power in self.powers.items())
        value = max(math.exp(log), floor)
        low = value / self.factor
        return Estimate(self.method, value, low if low > floor else 0.0, value * self.factor, False)


class Score(NamedTuple):
    """What verdicts were worth on held-out data of networks that they were not fitted on.

    Attributes:
        tier: what they were made from.
        tolerance: that was asked for.
        hits: share that named the cheapest sufficient method, uncertain ones left out.
        uncertain: share of those.
        configurations, networks: how many were judged.
    """

    tier: Tier
    tolerance: float
    hits: float
    uncertain: float
    configurations: int
    networks: int


@dataclass(frozen=True)
class Coefficients:
    """Everything that was fitted.

    Attributes:
        floor: increases and ratios below it count as it.
        tolerance: at which rho_fn was measured.
        forecasts: name -> formula: "RTN", "GPTQ" and "train" from the width alone; "probes" and "early" for training.
        ranges: feature -> (least, largest) in the runs, with "weights" and "steps" among them.
        shares: tier -> the part of each 90 % interval that has to lie on one side of the tolerance for an answer.
        scores: of the verdicts.
        provenance: the runs, in words and by digest.
    """

    floor: float
    tolerance: float
    forecasts: Mapping[str, Forecast]
    ranges: Mapping[str, tuple[float, float]]
    shares: Mapping[Tier, float]
    scores: tuple[Score, ...]
    provenance: Mapping[str, object]

    def estimates(self, evidence: Evidence) -> tuple[Estimate, ...]:
        """Return what every method is expected to leave, cheapest first; measured where it was measured."""
        if evidence.rtn is None:
            return tuple(self._forecast(name, evidence) for name in ("RTN", "GPTQ", "train"))
        if evidence.gptq is None:
            return (evidence.rtn,)
        return (evidence.rtn, evidence.gptq, self._forecast("probes" if evidence.early is None else "early", evidence))

    def score(self, tier: Tier, tolerance: float) -> Score:
        """Return the score at the tolerance nearest to the one asked for."""
        return min((one for one in self.scores if one.tier == tier), key=lambda one: abs(math.log(one.tolerance / tolerance)))

    def judged(self, tolerance: float) -> bool:
        """Return whether verdicts were scored at a tolerance like this; a loss in other units than nats asks for very different ones."""
        return any(one.tolerance / FAR <= tolerance <= one.tolerance * FAR for one in self.scores)

    def features(self, evidence: Evidence) -> dict[str, float]:
        """Return what the formulas take, floored; what is not known is missing."""
        increases = {
            "rtn": evidence.rtn.increase if evidence.rtn else None,
            "gptq": evidence.gptq.increase if evidence.gptq else None,
            "early": evidence.early,
            "rho_fn": evidence.rho,
        }
        held = {name: min(max(value, self.floor), LARGEST) for name, value in increases.items() if value is not None}
        return {"rate": evidence.rate} | held

    def _forecast(self, name: str, evidence: Evidence) -> Estimate:
        return self.forecasts[name](self.features(evidence), self.floor)


def four_terms(d20: float, gptq: float, rho: float, floor: float = 0.003) -> float:
    """Return the training result by the formula of an earlier study, with the increase after 20 steps; it is no part of any verdict.

    Other networks, rates and schedules than those of `coefficients.json`, so it is independent of them.
    """
    return math.exp(-0.79 + 0.61 * math.log(max(d20, floor)) + 0.59 * math.log(max(gptq, floor)) - 0.28 * math.log(max(rho, floor)))


@cache
def packaged() -> Coefficients:
    """Return the coefficients that come with the package."""
    return parsed(files("stepwell.advice").joinpath(FILE).read_text())


def parsed(text: str) -> Coefficients:
    """Return coefficients from their JSON."""
    held = json.loads(text)
    return Coefficients(
        floor=held["floor"],
        tolerance=held["tolerance"],
        forecasts={name: Forecast(**one) for name, one in held["forecasts"].items()},
        ranges={name: (low, high) for name, (low, high) in held["ranges"].items()},
        shares=held["shares"],
        scores=tuple(Score(**one) for one in held["scores"]),
        provenance=held["provenance"],
    )
