"""What `stepwell explain` says in sentences, each made from the numbers, for the page and for the terminal."""

import math

from stepwell.advice.forecast import Estimate
from stepwell.advice.verdict import decide
from stepwell.explain.records import Explanation, GridReport, Search

VERDICTS = {
    "RTN": "RTN is enough",
    "GPTQ": "GPTQ is enough",
    "train": "train",
    "not reachable": "not reachable",
    "uncertain": "uncertain",
}


def signed(value: float) -> str:
    """Return a change of the loss with its sign, briefly.

    >>> signed(0.012345), signed(-3.25), signed(float("inf"))
    ('+0.0123', '-3.25', '+inf')
    """
    value += 0.0  # no sign before a zero that was negative
    return f"{value:+.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:+.1e}"


def aligned(value: float, tolerance: float, sign: str = "+") -> str:
    """Return a change of the loss with as many decimals as its tolerance asks for, so that a column of them lines up.

    >>> aligned(0.29871, 0.1), aligned(-0.00012, 0.1), aligned(12.3456, 0.1), aligned(0.2, 1.0, sign="-")
    ('+0.299', '-0.000', '+12.35', '0.20')
    >>> aligned(-0.00584, 0.05), aligned(-0.00584, 0.01)
    ('-0.006', '-0.0058')
    >>> aligned(3.14e-8, 1e-7)  # so many zeros would not fit
    '+3.1e-08'
    """
    if not 1e-4 <= tolerance < 1e5:
        return f"{value:{sign}.1e}"
    decimals = max(0, 2 - math.ceil(math.log10(tolerance)))
    return f"{value:{sign}.{max(decimals - (abs(value) >= 10), 0)}f}"


def brief(value: float) -> str:
    """Return an end of an interval with two digits."""
    return f"{value:.2g}" if abs(value) >= 0.001 or value == 0 else f"{value:.0e}"


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number of things.

    >>> counted(1, "grid"), counted(3, "grid"), counted(2, "batch", "batches")
    ('1 grid', '3 grids', '2 batches')
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def named(report: GridReport, explanation: Explanation) -> str:
    """Return a grid's name, without the scheme where there is only one."""
    only = len({one.scheme for one in explanation.grids}) == 1
    return f"{report.bits} bits" if only else f"{report.scheme}, {report.bits} bits"


def headline(report: GridReport) -> str:
    """Return the verdict in three words; a method that is surely enough is named also where a cheaper one may be."""
    one = report.verdict
    return f"{one.safe}, or less" if one.method == "uncertain" and one.safe else VERDICTS[one.method]


def decisive(report: GridReport) -> Estimate:
    """Return what the headline is about: the method that it names, or the one whose sufficiency is in doubt."""
    one = report.verdict
    if one.method == "uncertain" and one.safe:
        return next(known for known in one.estimates if known.method == one.safe)
    return decide(one.estimates, one.tolerance, share=one.share, forecasts=not math.isnan(one.hit_rate))[1]


def by(method: str) -> str:
    """Return a method as a noun."""
    return "training" if method == "train" else method


def verdict(report: GridReport) -> str:
    """Say what to expect of the method that is advised, and what else is known."""
    one, known = report.verdict, decisive(report)
    words = f"Expected increase by {by(known.method)}: {signed(known.increase)} ({brief(known.low)} to {brief(known.high)})"
    if not measured(report):
        words = f"Nothing that was measured is enough, and no forecast holds at a tolerance of {one.tolerance:g}"
    elif one.method == "uncertain":
        words += ", surely enough" if one.safe else ", too close to call; nothing that was looked at is surely enough"
    rtn = "" if known.method == "RTN" else f" Rounding to nearest: {signed(report.rtn.increase)}."
    return f"{words}.{rtn}{searched(report)}"


def measured(report: GridReport) -> bool:
    """Say whether the number that a verdict is about was measured, or forecast by a formula that holds at this tolerance."""
    return not math.isnan(report.verdict.hit_rate) or decisive(report).measured


def searched(report: GridReport) -> str:
    """Say, where neither RTN nor GPTQ is enough, that searched scales are: no verdict is given on them, but they were measured."""
    best = min(report.rounded[1:3], key=lambda one: one.increase)
    if {report.verdict.method, report.verdict.safe} & {"RTN", "GPTQ"} or not best.within:
        return ""
    kind = "weighted by curvature" if best.method == "curvature scales" else "searched by squared error"
    return (
        f" Without training, rounding with scales {kind} came within tolerance, {signed(best.increase)}: no verdict judges it, look at it "
        "first."
    )


def worst(report: GridReport) -> str:
    """Say which weight hurts most, in one sentence."""
    assert report.closer is not None
    first = report.closer.layers[0]
    if first.alone <= 0:
        return "No weight raises the loss when it alone is rounded."
    return (
        f"{first.name} does the most damage: rounded alone it raises the loss by {signed(first.alone)}; left in float while all others are "
        f"rounded, it changes the loss by {signed(-first.removed)}."
    )


def damage(report: GridReport) -> str:
    """Say which weight hurts most, and how single layers add up."""
    assert report.closer is not None
    layers, together = report.closer.layers, report.rtn.increase
    total = sum(max(one.alone, 0.0) for one in layers)
    if total <= 0:
        return worst(report)
    if not math.isfinite(total + together):
        return f"{layers[0].name} does the most damage; the loss overflows, so shares cannot be given."
    return (
        f"{worst(report)} The increases of {len(layers)} single weights sum to {signed(total)}, of which it has "
        f"{max(layers[0].alone, 0.0) / total:.0%}; all at once cost {signed(together)}, "
        f"{'about' if abs(together - total) < 0.02 * total else 'more than' if together > total else 'less than'} the sum."
    )


def near(report: GridReport, explanation: Explanation) -> str:
    """Say whether a low-loss grid point was found next to the rounded weights."""
    assert report.closer is not None
    searches, tolerance = report.closer.searches, explanation.tolerance
    best = min(searches, key=lambda one: (not one.within, one.held_out))
    below = best.held_out < -tolerance
    if best.within and not explanation.held_out:
        return (
            f"{_opening(best)} found a grid point with {signed(best.held_out)}, no code more than one step from the rounded weights and "
            f"{best.changed:.1%} of them moved, on the one batch that guided it: other data may disagree."
        )
    if best.within:
        return (
            f"{_opening(best)} found a grid point with {signed(best.held_out)} on batches that it did not see, no code more than "
            f"one step from the rounded weights and {best.changed:.1%} of them moved: proof that such points exist"
            + (", as rounding itself is one." if report.rtn.within else ", which rounding to nearest missed.")
            + (" What lies below the float loss is what training on such data gains, not what rounding had cost." if below else "")
        )
    budget = " and ".join(_budget(one) for one in searches)
    if not explanation.held_out:
        return f"Not found within {budget}; the best point is at {signed(best.held_out)}. That does not show that there is none."
    overfit = [one for one in searches if one.loss <= tolerance]
    if overfit:
        return (
            f"{_opening(overfit[0])} came within tolerance on the batches it saw ({signed(overfit[0].loss)}), but not on the "
            f"others ({signed(overfit[0].held_out)}): it fitted its data. A point that is low on both was not found within {budget}."
        )
    return (
        f"Not found within {budget}; the best point is at {signed(best.held_out)} on held-out batches. A search that fails does not show "
        "that there is none."
    )


def inward(report: GridReport) -> str:
    """Say which way the gradient points at the rounded and at the float weights."""
    assert report.closer is not None
    first, later = report.closer.inward
    return (
        f"At the rounded weights, descent has a cosine of {first.cosine:.3g} with the way back to the float weights, "
        f"{first.cosine / first.random:.1f} times the size that a random direction has ({first.random:.2g}); at the float weights "
        f"themselves it is {first.latent_cosine:.3g}. After {report.closer.searches[1].evaluations} steps of training inside the box it is "
        f"{later.cosine:.3g} at the deployed and {later.latent_cosine:.3g} at the latent weights. A positive sign alone is no evidence "
        "of a wall: on any convex slice it is positive. What tells is the size, beside the random level and the latent weights."
    )


def line(report: GridReport) -> str:
    """Say how the loss grows from the float to the rounded weights."""
    exponent, barrier = report.line.exponent, report.line.barrier
    if math.isnan(exponent):
        return f"at {report.bits} bits it does not rise throughout"
    shape = "as a quadratic bowl would (2)" if 1.7 <= exponent <= 2.4 else "flatter, then steeper" if exponent > 2.4 else "steep at once"
    hill = f", over a barrier of {signed(barrier)}" if barrier > 0.001 else ""
    return f"at {report.bits} bits it rises with power {exponent:.1f} of the distance, {shape}{hill}"


def _opening(search: Search) -> str:
    return search.method[:1].upper() + search.method[1:]


def _budget(search: Search) -> str:
    return f"{search.evaluations} {'steps of box QAT' if search.method == 'box QAT' else 'evaluations of the flip search'}"
