"""Bits per layer: the fewest that keep the loss within a tolerance, or the lowest loss that a budget of bits allows, without training.

What every layer alone loses on every grid is measured, an integer program picks a grid per layer, and the joint loss of the pick is
measured, because the losses of layers do not add up. Where it is too high the program is asked for less (the aim shrinks by 0.85) until
it is not; then single layers are lowered while it stays within the tolerance. Picks are chosen by the data that they are measured on, so
the loss that counts is the upper end of its 90 % interval, as in `advise`: otherwise other data would often find it too high. What this
saves is measured in `papers/basin/bits.py`. Where the model is trained on its grid afterwards it saves nothing: uniform bits are as good.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from stepwell.advice.allocation import Array, fewest_bits, least_increase, stored_bits, total
from stepwell.advice.forecast import Estimate
from stepwell.advice.measure import BatchLoss, Losses, increase, listed
from stepwell.presets import intn
from stepwell.probes.stage import Cost, Stage, check_tolerance, staged
from stepwell.ptq.chosen import Chosen, chosen
from stepwell.quantizers import Quantizer

GRIDS = tuple(intn(bits, block="channel", scale="mse") for bits in (2, 3, 4, 5, 6, 8))
SHRINK, SMALLEST_AIM = 0.85, 0.01  # of the tolerance: below, the sum of single losses says nothing about the joint one
AFTER_TRAINING = (
    "If the model is trained on these grids afterwards, uniform bits are as good: mixed bits pay where rounding is all that is done."
)
Picks = tuple[int, ...]


@dataclass(frozen=True)
class BitsPerLayer:
    """A grid for every layer, and what it costs; exact for the given data.

    Attributes:
        quantizers: name -> grid, as `ptq.rtn` and `ptq.gptq` take it; `{name: sw.ste(q) for name, q in found.quantizers.items()}` is what
            `attach` takes.
        bits: stored bits per weight over these layers, scales included.
        predicted: increase of the loss if the increases of single layers added up.
        measured: increase of the loss with all layers rounded.
        high: the upper end of its 90 % interval over batches; twice `measured` with a single batch, which gives none.
        within: whether `high` is within the tolerance, which it is unless the finest grid misses it; always true of a budget.
        uniform: the single grid that does the same with the fewest bits (of a budget: with the lowest loss); None where there is none.
        uniform_bits, uniform_measured: its bits per weight and its increase; NaN without one.
        alone: name -> increase of the loss with this layer alone on each grid, in the order of the grids given.
        start: the loss of the float model.
        evaluations: joint losses that were measured.
        cost: passes over the data, all of them.
    """

    quantizers: dict[str, Quantizer]
    bits: float
    predicted: float
    measured: float
    high: float
    within: bool
    uniform: Quantizer | None
    uniform_bits: float
    uniform_measured: float
    alone: dict[str, tuple[float, ...]]
    start: float
    evaluations: int
    cost: Cost

    def __str__(self) -> str:
        width = max(len(name) for name in self.quantizers)
        lines = [f"{name:<{width}}  {grid}" for name, grid in self.quantizers.items()]
        beside = f"; {self.uniform} everywhere: {self.uniform_bits:.3g} bits, {self.uniform_measured:+.3g}" if self.uniform else ""
        word = "" if self.within else ", more than was asked for"
        return "\n".join(
            [*lines, f"{self.bits:.3g} bits per weight, loss {self.measured:+.3g} (at most {self.high:.3g}){word}{beside}.", AFTER_TRAINING]
        )


def bits_per_layer(
    model: nn.Module,
    loss: BatchLoss,
    batches: Iterable[Any],
    *,
    grids: Sequence[Quantizer] = GRIDS,
    tolerance: float | None = None,
    bits_per_weight: float | None = None,
    skip: Sequence[str] = (),
    on_step: Callable[[str], None] | None = None,
) -> BitsPerLayer:
    """Choose a grid for every layer: the fewest bits within a tolerance, or the lowest loss within a budget of bits.

    The result is never worse than the best single grid for all layers, which is measured too. What counts as within the tolerance is the
    upper end of the 90 % interval of the mean over batches, so that other data agree: the more batches, the less it costs. Mixed bits pay
    where rounding is all that is done: after quantization-aware training uniform bits are as good.

    Args:
        model: any module, in float; left exactly as found. One copy of its weights is held.
        loss: `loss(model, batch)` returns the mean loss of one batch as a tensor with one element, the same for the same weights.
        batches: data that the model was not trained on, in batches of equal size, ten or more. BatchNorm statistics are re-estimated on
            them for rounded weights; do so in deployment.
        grids: what to choose from, two or more; the default is 2, 3, 4, 5, 6 and 8 bits per channel.
        tolerance: growth of the loss that is acceptable, above 0.
        bits_per_weight: stored bits per weight that are available over all chosen layers, scales included. Give this or `tolerance`.
        skip: names or patterns of parameters or modules to leave in float.
        on_step: called with a few words whenever something has been measured: show progress.

    Returns:
        The grids with their losses. A forward pass per layer and grid, and usually fewer than 30 for joint losses.

    Raises:
        TypeError: something of another kind where grids, a loss or batches belong.
        ValueError: none or both of `tolerance` and `bits_per_weight`, one that is not positive, a budget that the smallest grids exceed,
            fewer than two grids or one of them twice, no batches, and what `ptq.rtn` and `advise` refuse.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    >>> x = torch.randn(64, 8)
    >>> found = bits_per_layer(model, lambda model, x: (model(x) - 1).square().mean(), [x], tolerance=1.0)
    >>> found.measured <= 1.0, sorted(found.quantizers)
    (True, ['0.weight', '1.weight'])
    """
    _check_asked(tolerance, bits_per_weight)
    rows = _rows(model, grids, skip)
    losses, say = Losses(loss, listed(batches, "batches")), on_step or (lambda words: None)
    table = _bits(rows)
    weights = sum(row.parameter.numel() for row in rows[0])
    if bits_per_weight is not None and table.min(axis=1).sum() > bits_per_weight * weights:
        raise ValueError(
            f"`bits_per_weight` must be at least {table.min(axis=1).sum() / weights:.3g}, what the smallest of `grids` take with their "
            f"scales: got {bits_per_weight:g}. Give smaller grids or larger blocks."
        )
    with staged(model, losses, [row.name for row in rows[0]]) as stage:
        search = _Search(stage, losses, rows, table, say)
        if tolerance is not None:
            picks, uniform = search.within(tolerance)
        else:
            assert bits_per_weight is not None
            picks, uniform = search.budget(bits_per_weight * weights)
        return search.result(picks, uniform, weights, tolerance)


class _Search:
    """Joint losses of picked grids, measured once each, and the increases of single layers."""

    def __init__(self, stage: Stage, losses: Losses, rows: Sequence[Sequence[Chosen]], bits: Array, say: Callable[[str], None]) -> None:
        """Measure every layer alone on every grid; `rows[k]` are all layers on grid k."""
        self._stage, self._losses, self._base, self._rows, self._say, self.bits = stage, losses, list(losses.last), rows, say, bits
        self._names = [row.name for row in rows[0]]
        self._scales: dict[tuple[str, int], Tensor] = {}
        self._seen: dict[Picks, Estimate] = {}
        self.alone = np.array([[self._measured({name: k}).increase for k in range(len(rows))] for name in self._names])
        self._sums = np.maximum(self.alone, 0)  # a layer whose rounding happens to help earns no credit

    def joint(self, picks: Picks) -> Estimate:
        """Return the increase of the loss with every layer on its grid."""
        if picks not in self._seen:
            self._seen[picks] = self._measured(dict(zip(self._names, picks, strict=True)))
        return self._seen[picks]

    def within(self, tolerance: float) -> tuple[Picks, Picks | None]:
        """Return the grids with the fewest bits found within a tolerance, and the uniform ones; the finest where there are none."""
        every = self._uniform()
        uniform = next((picks for picks in every if self.joint(picks).high <= tolerance), None)
        if uniform is None:
            return every[-1], None
        aim, best = tolerance, uniform
        while aim > SMALLEST_AIM * tolerance:
            picks = fewest_bits(self._sums, self.bits, aim)
            if picks is None or total(self.bits, picks) >= total(self.bits, uniform):
                break
            if self.joint(picks).high <= tolerance:
                best = picks
                break
            aim *= SHRINK
        return self._lowered(best, tolerance), uniform

    def budget(self, budget: float) -> tuple[Picks, Picks | None]:
        """Return the grids with the lowest joint loss within a number of bits, of the program's pick and the uniform ones."""
        affordable = [picks for picks in self._uniform() if total(self.bits, picks) <= budget]
        uniform = min(affordable, key=lambda picks: self.joint(picks).increase, default=None)
        picks = least_increase(self._sums, self.bits, budget)
        if picks is None or (uniform is not None and self.joint(uniform).increase <= self.joint(picks).increase):
            assert uniform is not None  # the caller has checked that something fits
            return uniform, uniform
        return picks, uniform

    def result(self, picks: Picks, uniform: Picks | None, weights: int, tolerance: float | None) -> BitsPerLayer:
        """Return the record of a choice."""
        measured = self.joint(picks)
        return BitsPerLayer(
            quantizers={name: self._rows[k][layer].quantizer for layer, (name, k) in enumerate(zip(self._names, picks, strict=True))},
            bits=total(self.bits, picks) / weights,
            predicted=total(self.alone, picks),
            measured=measured.increase,
            high=measured.high,
            within=tolerance is None or measured.high <= tolerance,
            uniform=None if uniform is None else self._rows[uniform[0]][0].quantizer,
            uniform_bits=np.nan if uniform is None else total(self.bits, uniform) / weights,
            uniform_measured=np.nan if uniform is None else self.joint(uniform).increase,
            alone=dict(zip(self._names, map(tuple, self.alone.tolist()), strict=True)),
            start=self._stage.start,
            evaluations=len(self._seen),
            cost=self._stage.cost,
        )

    def _uniform(self) -> list[Picks]:
        """Return every grid for all layers, the fewest bits first."""
        order = self.bits.sum(axis=0).argsort(kind="stable")
        return [(int(k),) * len(self._names) for k in order]

    def _lowered(self, picks: Picks, tolerance: float) -> Picks:
        """Lower single layers to their next smaller grid while the joint loss stays within; the most bits for the loss first."""
        stuck: set[int] = set()
        while True:
            steps = {layer: step for layer in range(len(picks)) if layer not in stuck and (step := self._step(picks, layer)) is not None}
            if not steps:
                return picks
            layer = max(steps, key=lambda layer: steps[layer][1])
            lower = (*picks[:layer], steps[layer][0], *picks[layer + 1 :])
            if self.joint(lower).high <= tolerance:
                picks = lower
            else:
                stuck.add(layer)

    def _step(self, picks: Picks, layer: int) -> tuple[int, float] | None:
        """Return the next smaller grid of a layer, and the bits that it saves per increase of the loss; None where there is none."""
        bits, sums, here = self.bits[layer], self._sums[layer], picks[layer]
        smaller = [k for k in range(len(bits)) if bits[k] < bits[here]]
        if not smaller:
            return None
        k = max(smaller, key=lambda k: bits[k])
        return k, float((bits[here] - bits[k]) / max(sums[k] - sums[here], 1e-12))

    def _measured(self, picks: dict[str, int]) -> Estimate:
        """Return the increase of the loss with some layers rounded."""
        layers = {name: layer for layer, name in enumerate(self._names)}

        def rounded(name: str, base: Tensor) -> Tensor:
            if name not in picks:
                return base
            k = picks[name]
            grid = self._rows[k][layers[name]].quantizer
            if (name, k) not in self._scales:
                self._scales[name, k] = grid.scale(base)
            return grid(base, scale=self._scales[name, k])

        self._stage.put(rounded)
        found = increase(self._stage, self._losses, self._base, "RTN", settle=self._losses)
        what = (
            " and ".join(f"{name} on {self._rows[k][layers[name]].quantizer}" for name, k in picks.items())
            if len(picks) == 1
            else "joint loss"
        )
        self._say(f"{what}: {found.increase:+.3g}")
        return found


def _check_asked(tolerance: float | None, bits_per_weight: float | None) -> None:
    """Raise unless exactly one goal is given, and it can be met in principle."""
    if (tolerance is None) == (bits_per_weight is None):
        raise ValueError(
            f"give either `tolerance` or `bits_per_weight`: got tolerance={tolerance}, bits_per_weight={bits_per_weight}. "
            "The first asks for the fewest bits, the second for the lowest loss."
        )
    if tolerance is not None:
        check_tolerance(tolerance)
    elif isinstance(bits_per_weight, bool) or not isinstance(bits_per_weight, int | float) or not 0 < bits_per_weight < np.inf:
        raise ValueError(f"`bits_per_weight` must be a positive number, such as 3.5: got {bits_per_weight!r}.")


def _rows(model: nn.Module, grids: Sequence[Quantizer], skip: Sequence[str]) -> list[list[Chosen]]:
    """Return the layers on every grid, or refuse the grids."""
    if isinstance(grids, Quantizer) or not isinstance(grids, Iterable):
        raise TypeError(f"`grids` must be a list of quantizers: got a {type(grids).__name__}. Write grids=[int3(), int4()].")
    given = list(grids)
    for grid in given:
        if not isinstance(grid, Quantizer):
            raise TypeError(f"`grids` must hold quantizers: got {grid!r}. Try `int4()`.")
    if len(given) < 2 or len(set(given)) < len(given):
        raise ValueError(f"`grids` must hold two or more different grids to choose from: got {', '.join(map(str, given)) or 'none'}.")
    return [chosen(model, grid, skip=skip) for grid in given]


def _bits(rows: Sequence[Sequence[Chosen]]) -> Array:
    """Return the stored bits of every layer on every grid, `(layers, grids)`."""
    return np.array([[stored_bits(one.quantizer, tuple(one.parameter.shape)) * one.parameter.numel() for one in row] for row in rows]).T
