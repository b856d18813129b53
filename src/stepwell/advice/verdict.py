"""Verdict: the cheapest method that keeps a model within tolerance on one grid, with its evidence and its error."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stepwell.advice.forecast import Estimate
from stepwell.probes.stage import Cost

Method = Literal["RTN", "GPTQ", "train", "not reachable", "uncertain"]
WORDS: dict[Method, str] = {
    "RTN": "RTN is enough",
    "GPTQ": "GPTQ is enough",
    "train": "train",
    "not reachable": "not reachable within budget",
    "uncertain": "uncertain",
}


@dataclass(frozen=True)
class Verdict:
    """What to do with one grid.

    Attributes:
        method: the cheapest one that is sufficient: "RTN", "GPTQ" or "train"; "not reachable" where training as in the fitted runs is
            expected to miss the tolerance; "uncertain" where the first candidate that is not ruled out lies too close to it.
        predicted: increase of the loss that this method leaves; for "not reachable" that of training, for "uncertain" of the candidate.
        low, high: its 90 % interval: of the mean over batches for a measured increase, of earlier forecasts' errors for a forecast. A
            forecast's `low` of 0 stands for everything below the floor of the fit.
        reasons: why, in plain words.
        cost: passes spent on this grid alone; what all grids share stands in `Advice.shared`.
        grid: the quantizer, in words.
        tolerance: the increase that counts as sufficient.
        rho: rounding distance in widths of the basin (rho_fn), at the tolerance.
        estimates: what each method was measured or forecast to leave, cheapest first; those that were not needed are missing.
        share: the part of each 90 % interval that has to lie on one side of the tolerance for an answer: with it, answers for networks that
            were left out of the fit were right in 98 %.
        safe: the cheapest method whose whole interval is within tolerance; None where there is none.
        hit_rate: how often such a verdict was right on networks that its coefficients were not fitted on, uncertain ones left out; NaN
            where nothing was judged at a tolerance like this.
    """

    method: Method
    predicted: float
    low: float
    high: float
    reasons: tuple[str, ...]
    cost: Cost
    grid: str
    tolerance: float
    rho: float
    estimates: tuple[Estimate, ...]
    share: float
    safe: str | None
    hit_rate: float

    def __str__(self) -> str:
        return f"{self.grid}: {WORDS[self.method]}, loss {self.predicted:+.2g} ({_ends(self)})"


class Advice(list[Verdict]):
    """Verdicts in the order of the quantizers; prints as a table.

    Attributes:
        shared: passes that were spent once for all grids.
        notes: what holds for all of them: which batches calibrated and which measured, what the verdicts were worth elsewhere.
    """

    def __init__(self, verdicts: Iterable[Verdict], *, shared: Cost, notes: Sequence[str]) -> None:
        super().__init__(verdicts)
        self.shared, self.notes = shared, tuple(notes)

    @property
    def cost(self) -> Cost:
        """All passes that were spent."""
        return sum((verdict.cost for verdict in self), self.shared)

    def __str__(self) -> str:
        head = ("grid", "verdict", "loss", "interval", "rho", "passes")
        rows = [(one.grid, WORDS[one.method], f"{one.predicted:+.2g}", _ends(one), f"{one.rho:.2f}", _passes(one.cost)) for one in self]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
        return "\n".join([*lines, f"All share {_passes(self.shared)} passes.", *self.notes])

    __repr__ = __str__


def decide(estimates: Sequence[Estimate], tolerance: float, *, share: float = 1.0, forecasts: bool = True) -> tuple[Method, Estimate]:
    """Return the verdict over methods, cheapest first, and the estimate that it rests on.

    A method is taken where its interval is within tolerance, ruled out where none of it is; in between nothing can be said. Nor can it of
    anything that is not measured where `forecasts` is False. `share` is the part of the interval that counts.

    >>> rtn, gptq = Estimate("RTN", 0.3, 0.2, 0.4, True), Estimate("GPTQ", 0.05, 0.04, 0.06, True)
    >>> decide([rtn, gptq], 0.1)[0], decide([rtn, gptq], 0.05)[0], decide([rtn, gptq], 0.5)[0]
    ('GPTQ', 'uncertain', 'RTN')
    """
    for one in estimates:
        if not (one.measured or forecasts):
            return "uncertain", one
        near = one.narrowed(share)
        if near.high <= tolerance:
            return one.method, one
        if near.low <= tolerance:
            return "uncertain", one
    return "not reachable", estimates[-1]


def safe(estimates: Sequence[Estimate], tolerance: float, *, forecasts: bool = True) -> str | None:
    """Return the cheapest method whose whole interval is within tolerance; of those measured alone where `forecasts` is False."""
    return next((one.method for one in estimates if one.high <= tolerance and (one.measured or forecasts)), None)


def _ends(verdict: Verdict) -> str:
    return f"{verdict.low:.2g} to {verdict.high:.2g}"


def _passes(cost: Cost) -> str:
    return f"{cost.forward} + {cost.backward} backward" if cost.backward else f"{cost.forward}"
