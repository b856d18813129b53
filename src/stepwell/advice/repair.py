"""Repair: from a program's picks, which add up the losses of single layers, to picks whose joint loss is what was asked for.

The program is asked for the tolerance, then for less (0.85 of it, and so on) until the joint loss is within the tolerance. Then bits are
taken away while it stays there: a layer goes to its next smaller grid, or one goes down and another up where that saves bits.
"""

from stepwell.advice.allocation import Picks, fewest_bits, least_increase, total
from stepwell.advice.layers import Layers

SHRINK, SMALLEST_AIM = 0.85, 0.01  # of the tolerance: below, the sum of single losses says nothing about the joint one


def within(layers: Layers, tolerance: float) -> tuple[Picks, Picks | None]:
    """Return the picks with the fewest bits that were found within a tolerance, and the uniform ones; the finest where there are none."""
    every = layers.uniform()
    uniform = next((picks for picks in every if layers.joint(picks).high <= tolerance), None)
    if uniform is None:
        return every[-1], None
    aim, best = tolerance, uniform
    while aim > SMALLEST_AIM * tolerance:
        picks = fewest_bits(layers.sums, layers.bits, aim)
        if picks is None or total(layers.bits, picks) >= total(layers.bits, uniform):
            break
        if layers.joint(picks).high <= tolerance:
            best = picks
            break
        aim *= SHRINK
    best = _lowered(layers, best, tolerance)
    while (other := _exchanged(layers, best, tolerance)) is not None:
        best = _lowered(layers, other, tolerance)
    return best, uniform


def affordable(layers: Layers, budget: float) -> tuple[Picks, Picks | None]:
    """Return the picks with the lowest joint loss within a number of bits, of the program's and the uniform ones, and the uniform ones."""
    cheap = [picks for picks in layers.uniform() if total(layers.bits, picks) <= budget]
    uniform = min(cheap, key=lambda picks: layers.joint(picks).increase, default=None)
    picks = least_increase(layers.sums, layers.bits, budget)
    assert picks is not None  # the caller has checked that something fits
    if uniform is not None and layers.joint(uniform).increase <= layers.joint(picks).increase:
        return uniform, uniform
    return picks, uniform


def _lowered(layers: Layers, picks: Picks, tolerance: float) -> Picks:
    """Lower single layers to their next smaller grid while the joint loss stays within; the most bits for the loss first."""
    stuck: set[int] = set()
    while True:
        steps = {layer: k for layer in range(len(picks)) if layer not in stuck and (k := _next(layers, picks, layer, -1)) is not None}
        if not steps:
            return picks
        layer = max(steps, key=lambda layer: _worth(layers, picks, layer, steps[layer]))
        lower = _moved(picks, {layer: steps[layer]})
        if layers.joint(lower).high <= tolerance:
            picks = lower
        else:
            stuck.add(layer)


def _exchanged(layers: Layers, picks: Picks, tolerance: float) -> Picks | None:
    """Return picks with one layer lower and another higher that take fewer bits and stay within; None if the most promising do not."""
    down, up = ({layer: _next(layers, picks, layer, sign) for layer in range(len(picks))} for sign in (-1, 1))
    trials = [
        _moved(picks, {one: low, other: high})
        for one, low in down.items()
        for other, high in up.items()
        if one != other and low is not None and high is not None
    ]
    fewer = [trial for trial in trials if total(layers.bits, trial) < total(layers.bits, picks)]
    best = sorted(fewer, key=lambda trial: total(layers.sums, trial))[: len(picks)]
    return next((trial for trial in best if layers.joint(trial).high <= tolerance), None)


def _next(layers: Layers, picks: Picks, layer: int, sign: int) -> int | None:
    """Return the grid of a layer that takes the next fewer bits, or the next more; None where there is none."""
    bits = sign * layers.bits[layer]
    further = [k for k in range(len(bits)) if bits[k] > bits[picks[layer]]]
    return min(further, key=lambda k: float(bits[k]), default=None)


def _worth(layers: Layers, picks: Picks, layer: int, k: int) -> float:
    """Return the bits that a smaller grid saves per increase of the loss."""
    bits, sums, here = layers.bits[layer], layers.sums[layer], picks[layer]
    return float((bits[here] - bits[k]) / max(sums[k] - sums[here], 1e-12))


def _moved(picks: Picks, to: dict[int, int]) -> Picks:
    return tuple(to.get(layer, k) for layer, k in enumerate(picks))
