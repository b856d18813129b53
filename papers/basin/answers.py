"""What the advisor answers for a run, whether that is right on held-out data, and how sure it has to be. Running it does nothing.

How sure is a share of every 90 % interval: an answer is given where that part of it lies on one side of the tolerance. It is the smallest
share with which 98 % of the answers are right on networks left out of the fit, at all tolerances together: selective prediction at a
prescribed risk (Geifman and El-Yaniv, arXiv:1705.08500), without their bound, which these few networks do not give. 98 % is the goal that
an earlier study on other networks set; it was not varied. Networks that are scored take no part in the choice for them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fitting import ASKED, REFERENCE, Run, evidence, formulas, left_out

from stepwell.advice.forecast import Coefficients, Tier
from stepwell.advice.verdict import decide, safe

TOLERANCES = (ASKED, REFERENCE, 0.3)
TIERS: tuple[Tier, ...] = ("width", "probes", "early")
SHARES = tuple(k / 20 for k in range(20, -1, -1))
RIGHT = 0.98
DEFAULT_RATE = 1e-3


class Case(NamedTuple):
    """One configuration, judged."""

    split: str
    tier: Tier
    tolerance: float
    run: Run
    advised: str
    cheapest: str
    surely: str | None
    predicted: float
    low: float
    high: float


def coefficients(runs: Sequence[Run]) -> Coefficients:
    """Return all formulas, fitted on these runs and no others, with their intervals and what part of these decides; without scores."""
    return replace(formulas(runs), shares=shares(runs))


def shares(runs: Sequence[Run]) -> dict[Tier, float]:
    """Return for every tier the smallest share from which on enough answers are right, each network judged without its own runs."""
    unseen = [(formulas(others), standard(mine)) for _, others, mine in left_out(runs, "network")]
    found: dict[Tier, float] = {}
    for tier in TIERS:
        best = SHARES[0]
        for share in SHARES:
            cases = [one for fitted, mine in unseen for one in judged(replace(fitted, shares={tier: share}), mine, "network", (tier,))]
            right = [case.advised == case.cheapest for case in cases if case.advised != "uncertain"]
            if sum(right) < RIGHT * len(right):
                break
            best = share
        found[tier] = best
    return found


def judged(fitted: Coefficients, runs: Sequence[Run], split: str, tiers: Sequence[Tier] = TIERS) -> Iterator[Case]:
    """Yield the configurations of some runs as fitted coefficients judge them, where the right answer is known."""
    for run, tier, tolerance in product(runs, tiers, TOLERANCES):
        if decidable(run, tolerance):
            yield case(fitted, run, split, tier, tolerance)


def case(fitted: Coefficients, run: Run, split: str, tier: Tier, tolerance: float) -> Case:
    """Judge one configuration as the library does: only where GPTQ is not enough is a tenth of the training run looked at."""
    known = evidence(run, measured=tier != "width", early=tier == "early" and math.isfinite(run.d10))
    estimates = fitted.estimates(known)
    advised, deciding = decide(estimates, tolerance, share=fitted.shares[tier])
    surely = safe(estimates, tolerance)
    return Case(split, tier, tolerance, run, advised, cheapest(run, tolerance), surely, deciding.increase, deciding.low, deciding.high)


def cheapest(run: Run, tolerance: float) -> str:
    """Return the first method that meets the tolerance on held-out data."""
    ends = {"RTN": run.rtn_heldout, "GPTQ": run.gptq_heldout, "train": run.qat_heldout}
    return next((method for method, end in ends.items() if end <= tolerance), "not reachable")


def decidable(run: Run, tolerance: float) -> bool:
    """Return whether the cheapest method is known: where rounding is not enough, the training run must have been made."""
    return cheapest(run, tolerance) != "not reachable" or math.isfinite(run.qat_heldout)


def standard(runs: Sequence[Run]) -> list[Run]:
    """Return one run per configuration: the one whose rate is nearest to the library's default."""
    best: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        key = (run.network, run.scheme, run.bits)
        if key not in best or abs(math.log(run.rate / DEFAULT_RATE)) < abs(math.log(best[key].rate / DEFAULT_RATE)):
            best[key] = run
    return list(best.values())
