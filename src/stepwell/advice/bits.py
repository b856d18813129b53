"""Bits per layer: the fewest that keep the loss within a tolerance, or the lowest loss that a budget of bits allows, without training.

What every layer alone loses on every grid is measured, an integer program picks a grid per layer, and the joint loss of the pick is
measured, because the losses of layers do not add up (`repair`: ask the program for less until the joint loss is within the tolerance, then
take bits from layers while it stays there). Picks are chosen by the data that they are measured on, so
the loss that counts is the upper end of its 90 % interval, as in `advise`: otherwise other data would often find it too high. What this
saves is measured in `papers/basin/bits.py`. Where the model is trained on its grid afterwards it saves nothing: uniform bits are as good.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from stepwell.advice.allocation import Array, Picks, stored_bits, total
from stepwell.advice.layers import Layers
from stepwell.advice.measure import BatchLoss, Losses, listed
from stepwell.advice.repair import affordable, within
from stepwell.presets import intn
from stepwell.probes.stage import Cost, check_tolerance, staged
from stepwell.ptq.chosen import Chosen, chosen
from stepwell.quantizers import Quantizer

GRIDS = tuple(intn(bits, block="channel", scale="mse") for bits in (2, 3, 4, 5, 6, 8))
AFTER_TRAINING = (
    "If the model is trained on these grids afterwards, uniform bits are as good: mixed bits pay where rounding is all that is done."
)


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
        layers = Layers(stage, losses, rows, table, say)
        if tolerance is not None:
            found = within(layers, tolerance)
        else:
            assert bits_per_weight is not None
            found = affordable(layers, bits_per_weight * weights)
        return _result(layers, *found, weights, tolerance)


def _result(layers: Layers, picks: Picks, uniform: Picks | None, weights: int, tolerance: float | None) -> BitsPerLayer:
    """Return the record of a choice."""
    measured = layers.joint(picks)
    return BitsPerLayer(
        quantizers=layers.quantizers(picks),
        bits=total(layers.bits, picks) / weights,
        predicted=total(layers.alone, picks),
        measured=measured.increase,
        high=measured.high,
        within=tolerance is None or measured.high <= tolerance,
        uniform=None if uniform is None else next(iter(layers.quantizers(uniform).values())),
        uniform_bits=math.nan if uniform is None else total(layers.bits, uniform) / weights,
        uniform_measured=math.nan if uniform is None else layers.joint(uniform).increase,
        alone=dict(zip(layers.names, map(tuple, layers.alone.tolist()), strict=True)),
        start=layers.start,
        evaluations=layers.evaluations,
        cost=layers.cost,
    )


def _check_asked(tolerance: float | None, bits_per_weight: float | None) -> None:
    """Raise unless exactly one goal is given, and it can be met in principle."""
    if (tolerance is None) == (bits_per_weight is None):
        raise ValueError(
            f"give either `tolerance` or `bits_per_weight`: got tolerance={tolerance}, bits_per_weight={bits_per_weight}. "
            "The first asks for the fewest bits, the second for the lowest loss."
        )
    if tolerance is not None:
        check_tolerance(tolerance)
    elif isinstance(bits_per_weight, bool) or not isinstance(bits_per_weight, int | float) or not 0 < bits_per_weight < math.inf:
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
