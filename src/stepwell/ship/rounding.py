"""Rounding: a model's weights onto the plan's grids by one of the methods that need no training, one weight at a time.

The model holds the grid weights afterwards, and codes go to a mapping that may keep them on a disk, so that the model and what one layer
takes are all that is held.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.advice.measure import BatchLoss, Losses
from stepwell.probes.stage import staged
from stepwell.ptq.calibration import holders
from stepwell.ptq.chosen import Chosen, chosen
from stepwell.ptq.gptq import gptq
from stepwell.ptq.scale_search import scale_search
from stepwell.quantizers import Encoded
from stepwell.ship.plan import Plan

Store = MutableMapping[str, Encoded]
Progress = Callable[[str, int, int], None]  # words, how many are done, of how many


def rtn(model: nn.Module, plan: Plan, store: Store, *, progress: Progress) -> None:
    """Round every weight of the plan to nearest."""
    _one_by_one(model, plan, store, progress, lambda row: row.quantizer.encode(row.parameter))


def search(model: nn.Module, plan: Plan, store: Store, *, loss: BatchLoss, batches: Sequence[Any], progress: Progress) -> None:
    """Round every weight with searched scales: for the smallest squared error, weighted by the curvature of the loss where there is data.

    Curvature is the mean of squared gradients over batches; holding it takes as much memory as the model.
    """
    cost = _curvature(model, list(plan.grids), loss, batches, progress) if batches else {}

    def encode(row: Chosen) -> Encoded:
        found = scale_search(row.parameter.detach(), row.quantizer, cost.get(row.name))
        return row.quantizer.encode(row.parameter, scale=found)

    _one_by_one(model, plan, store, progress, encode)


def by_gptq(model: nn.Module, plan: Plan, store: Store, *, loss: BatchLoss, batches: Sequence[Any], progress: Progress) -> list[str]:
    """Round by GPTQ; return the names of weights that it cannot calibrate, which were rounded to nearest.

    Those go first, so that the others make up for them.
    """
    rows = chosen(model, plan.choices)
    beyond = _beyond(model, rows)
    count = 0

    def tell(name: str) -> None:
        nonlocal count
        count += 1
        progress(f"GPTQ {name}", count, len(rows))

    with torch.no_grad():
        for row in rows:
            if row.name in beyond:
                store[row.name] = row.quantizer.encode(row.parameter)
                row.parameter.copy_(store[row.name].decode())
                tell(row.name)
    if len(beyond) < len(rows):
        grids = {name: None if name in beyond else grid for name, grid in plan.grids.items()}
        gptq(model, {**grids, "*": None}, batches, forward=loss, on_layer=lambda name, _: tell(name), into=store)
    return sorted(beyond)


def _one_by_one(model: nn.Module, plan: Plan, store: Store, progress: Progress, encode: Callable[[Chosen], Encoded]) -> None:
    """Encode, keep the codes elsewhere, and put the grid weights into the model."""
    rows = chosen(model, plan.choices)
    with torch.no_grad():
        for place, row in enumerate(rows):
            progress(f"rounding {row.name}", place, len(rows))
            encoded = encode(row)
            store[row.name] = encoded
            row.parameter.copy_(encoded.decode())
        progress("rounded", len(rows), len(rows))


def _curvature(model: nn.Module, names: list[str], loss: BatchLoss, batches: Sequence[Any], progress: Progress) -> dict[str, Tensor]:
    """Return the mean over batches of the squared gradient of every weight."""
    with staged(model, Losses(loss, batches[:1]), names) as stage:
        total = {name: torch.zeros_like(base) for name, base in stage.base.items()}
        for place, batch in enumerate(batches):
            progress("curvature", place, len(batches))
            _, gradients = stage.gradient(lambda subject, batch=batch: loss(subject, batch))  # type: ignore[misc]
            for name, gradient in gradients.items():
                total[name].add_(gradient.to(total[name]).square_())
    return {name: value.div_(len(batches)) for name, value in total.items()}


def _beyond(model: nn.Module, rows: list[Chosen]) -> set[str]:
    """Return the names of weights whose layer's input is not what they are multiplied with (attention projections, experts)."""
    beyond = set()
    for row in rows:
        try:
            holders(model, {row.name: row.parameter})
        except ValueError:
            beyond.add(row.name)
    return beyond
