"""Reasons: a verdict's evidence in plain words."""

from collections.abc import Collection, Iterator, Sequence

from stepwell.advice.early import SHARE
from stepwell.advice.forecast import Coefficients, Estimate, Evidence, Score, four_terms
from stepwell.advice.verdict import safe

HOW = "train with straight-through rounding and LOTION's penalty: `stepwell.lotion(q, loss_terms=.., forward='nearest')`"


def reasons(
    estimates: Sequence[Estimate],
    evidence: Evidence,
    tolerance: float,
    coefficients: Coefficients,
    *,
    share: float,
    rho: float,
    d20: float | None,
    rounded_only: Collection[str],
    weights: int,
) -> Iterator[str]:
    """Yield the sentences behind a verdict, those that decide it first.

    Args:
        estimates, evidence, tolerance, coefficients: what it was made from.
        share: the part of each interval that decides.
        rho: rho_fn at the tolerance.
        d20: increase of the loss after 20 steps of an early run; None without one.
        rounded_only: weights that GPTQ could not calibrate.
        weights: how many are quantized.
    """
    judged = coefficients.judged(tolerance)
    known = [one for one in estimates if one.measured or judged]
    for one in known:
        yield _standing(one, tolerance, share)
        if one.high <= tolerance:
            break
    unsure = [one for one in known if one.low <= tolerance < one.high]
    sure = safe(known, tolerance)
    if len(known) < len(estimates) and not sure:
        near = sorted(score.tolerance for score in coefficients.scores)
        yield (
            f"what is not measured is unknown: forecasts are of cross entropies in nats and were judged at tolerances from {near[0]:g} to "
            f"{near[-1]:g}, {tolerance:g} is far from these"
        )
    if unsure and sure:
        yield f"{'training' if sure == 'train' else sure} is the cheapest that is surely enough"
    if unsure and not sure:
        yield "nothing that was looked at is surely enough"
    if estimates[-1].method == "train" and sure in ("train", None):
        if judged and estimates[-1].low <= tolerance:
            yield HOW
        if evidence.early is not None:
            yield f"after {SHARE:.0%} of the steps the rounded weights stand at {evidence.early:+.3g}"
        if judged:
            yield from _about_training(evidence, coefficients, d20, weights)
    yield f"rounding moves the weights {rho:.2g} basin widths (rho_fn; RTN tends to fail above 1)"
    if rounded_only and evidence.gptq is not None:
        shown = ", ".join(sorted(rounded_only)[:3]) + (" and others" if len(rounded_only) > 3 else "")
        yield f"GPTQ cannot see the inputs of {shown}: rounded to nearest there"


def hit_rate(score: Score, tolerance: float) -> str:
    """Return what verdicts like these were worth elsewhere, in words."""
    where = f"at tolerance {score.tolerance:g}"
    if score.tolerance != tolerance:
        where += f" (nothing was scored at {tolerance:g})"
    return (
        f"On held-out data of {score.networks} networks, each left out of the fit, {score.uncertain:.0%} of {score.configurations} such "
        f"verdicts {where} were uncertain; the others named the cheapest sufficient method in {score.hits:.0%} of cases."
    )


def _standing(one: Estimate, tolerance: float, share: float) -> str:
    """Return where one method stands, in words: for sure where its whole interval decides, most likely where its decisive part does."""
    near = one.narrowed(share)
    word = "enough" if near.high <= tolerance else "too much" if near.low > tolerance else "too close to call"
    if near.high <= tolerance < one.high or one.low <= tolerance < near.low:
        word += ", most likely"
    how = "measured" if one.measured else "forecast"
    name = "training" if one.method == "train" else one.method
    return f"{name} leaves {one.increase:+.3g} ({one.low:.3g} to {one.high:.3g}), {how}: {word}"


def _about_training(evidence: Evidence, coefficients: Coefficients, d20: float | None, weights: int) -> Iterator[str]:
    """Yield what a forecast of training rests on."""
    networks, rows = coefficients.provenance["networks"], coefficients.provenance["rows"]
    assert isinstance(networks, list)
    steps = coefficients.ranges["steps"]
    span = f"{steps[0]:g}" if steps[0] == steps[1] else f"{steps[0]:g} to {steps[1]:g}"
    yield f"forecast of straight-through training, {span} steps of Adam at {evidence.rate:g}, from {rows} runs of {len(networks)} networks"
    if d20 is not None and evidence.gptq is not None:
        other = four_terms(d20, evidence.gptq.increase, evidence.rho, coefficients.floor)
        yield f"an independent formula, from the loss after 20 steps ({d20:+.3g}), says {other:.3g}"
    for name, value in (("rate", evidence.rate), ("weights", weights), ("rho_fn", evidence.rho)):
        low, high = coefficients.ranges[name]
        if not low <= value <= high:
            yield f"{name} {value:.3g} is outside of what the runs covered, {low:.3g} to {high:.3g}: trust the interval less"
