"""Rounding without training: the encoded weights of every method, and what they lose."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.advice.measure import BatchLoss, Losses, paired
from stepwell.explain.records import Rounded
from stepwell.probes.points import Weights, weight
from stepwell.probes.stage import staged
from stepwell.ptq.chosen import Chosen
from stepwell.ptq.gptq import gptq
from stepwell.ptq.scale_search import scale_search
from stepwell.quantizers import Encoded

Point = dict[str, Encoded]


def curvature(model: nn.Module, loss: BatchLoss, batches: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean over batches of the squared gradient of every weight: how much an error of it costs, as Adam would estimate it."""
    with staged(model, Losses(loss, batches[:1]), names) as stage:
        total = {name: torch.zeros_like(base) for name, base in stage.base.items()}
        for batch in batches:
            stage.gradients(lambda name, gradient: total[name].addcmul_(gradient, gradient), _on(loss, batch))
    return {name: value.div_(len(batches)) for name, value in total.items()}


def without_data(rows: Sequence[Chosen], cost: Mapping[str, Tensor]) -> dict[str, Point]:
    """Return the weights rounded to nearest with the scheme's own scales, and with searched ones, without and with curvature."""
    return {
        "RTN": {row.name: row.quantizer.encode(row.parameter) for row in rows},
        "MSE scales": {row.name: _searched(row, None) for row in rows},
        "curvature scales": {row.name: _searched(row, cost[row.name]) for row in rows},
    }


def gptq_point(
    model: nn.Module, rows: Sequence[Chosen], rounded: Point, batches: Sequence[Any], loss: BatchLoss, beyond: frozenset[str]
) -> Point:
    """Return the weights rounded by GPTQ; the model is put back.

    Args:
        model: any module.
        rows: the weights and their grids.
        rounded: the same rounded to nearest, which stays for those that cannot be calibrated.
        batches: that calibrate.
        loss: runs the model on one of them.
        beyond: names of weights that cannot be calibrated.
    """
    grids = {row.name: None if row.name in beyond else row.quantizer for row in rows}
    if not any(grids.values()):
        return rounded
    names = [row.name for row in rows]
    with holding(model, {name: rounded[name] for name in names if name in beyond}, names):
        found = gptq(model, {**grids, "*": None}, batches, forward=loss)
    return {name: found.get(name, rounded[name]) for name in names}


def compare(
    model: nn.Module, losses: Losses, points: Mapping[str, Weights], tolerance: float, *, settle: Losses, before: Mapping[str, int]
) -> tuple[Rounded, ...]:
    """Return what each point loses, as `advise` measures it.

    Args:
        model: any module; left as found.
        losses: on the measuring batches.
        points: weights by the method that made them.
        tolerance: growth of the loss that still counts as good.
        settle: the loss on the data on which BatchNorm statistics are re-estimated at every point.
        before: passes that some methods have taken to make their point.
    """
    found = []
    with staged(model, losses, next(iter(points.values()))) as stage:
        base = list(losses.last)
        for method, point in points.items():
            stage.put(lambda name, at, point=point: weight(point[name], at))  # type: ignore[misc]
            begun = stage.cost.forward
            value = stage.settled(settle)
            growth, low, high = paired(losses.last, base)
            passes = before.get(method, 0) + stage.cost.forward - begun
            found.append(Rounded(method, value, growth, low, high, _stderr(losses.last, base), growth <= tolerance, passes))
    return tuple(found)


@contextmanager
def holding(model: nn.Module, point: Weights, names: Sequence[str] | None = None) -> Iterator[None]:
    """Let a model hold other weights for a while, and put back those of `names` (all of the point's) whatever happens."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    copies = {name: parameters[name].detach().clone() for name in (point if names is None else names)}
    try:
        with torch.no_grad():
            for name, value in point.items():
                parameters[name].copy_(weight(value, parameters[name]))
        yield
    finally:
        with torch.no_grad():
            for name, copy in copies.items():
                parameters[name].copy_(copy)


def spread(values: Sequence[float]) -> float:
    """Return the standard error of a mean; NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _searched(row: Chosen, cost: Tensor | None) -> Encoded:
    return row.quantizer.encode(row.parameter, scale=scale_search(row.parameter.detach(), row.quantizer, cost))


def _stderr(after: Sequence[float], before: Sequence[float]) -> float:
    changes = [one - other for one, other in zip(after, before, strict=True)]
    return spread(changes) if all(map(math.isfinite, changes)) else math.nan


def _on(loss: BatchLoss, batch: Any) -> Callable[[nn.Module], Tensor]:
    return lambda model: loss(model, batch)
