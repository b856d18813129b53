"""A closer look at one grid: where the damage sits, whether a low-loss grid point is found near, which way the gradient points."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from stepwell.advice.measure import BatchLoss, Losses
from stepwell.explain.effort import Effort
from stepwell.explain.records import Closer, Damage, Search
from stepwell.explain.rounding import Point, holding
from stepwell.probes.box_qat import Trained, box_qat
from stepwell.probes.inward import inward
from stepwell.probes.latent import latent
from stepwell.probes.neighbours import Neighbours, neighbours
from stepwell.probes.plane import plane
from stepwell.probes.points import weight
from stepwell.probes.quadratic import quadratic
from stepwell.probes.segment import segment
from stepwell.probes.stage import staged


class Data(NamedTuple):
    """A loss and its batches, divided.

    Attributes:
        loss: of a batch.
        search: batches that searches and training see.
        searching, measuring: mean losses over those and over the others.
        start, search_start: of the float weights, on the measuring and on the search batches.
    """

    loss: BatchLoss
    search: Sequence[Any]
    searching: Losses
    measuring: Losses
    start: float
    search_start: float


def look(model: nn.Module, data: Data, rounded: Point, gptq: Point, *, tolerance: float, effort: Effort) -> Closer:
    """Return what is found near the rounded weights.

    Args:
        model: holds the float weights; left as found.
        data: loss and batches.
        rounded, gptq: the weights rounded to nearest, and by GPTQ.
        tolerance: growth of the loss that still counts as low.
        effort: how much is measured.
    """
    floats = {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False) if name in rounded}
    flip = neighbours(model, data.searching, around=rounded, held_out=data.measuring, tolerance=tolerance, rounds=effort.rounds)
    box = box_qat(
        model,
        data.searching,
        around=rounded,
        train=lambda model, step: data.loss(model, data.search[step % len(data.search)]),
        held_out=data.measuring,
        steps=effort.steps,
        tolerance=tolerance,
    )
    before = inward(model, data.measuring, at=rounded, tolerance=tolerance)
    with holding(model, box.latent):
        after = inward(model, data.measuring, at=box.found, toward=floats, baseline=data.start, tolerance=tolerance)
        behind = latent(model, data.measuring, at=box.found, start=floats)
    return Closer(
        layers=damage(model, data.measuring, rounded, settle=data.searching),
        gptq_line=segment(model, data.measuring, toward=gptq, positions=effort.positions),
        quadratic=quadratic(model, data.measuring, toward=rounded),
        searches=(_flipped(flip, data, tolerance), _trained(box, data, tolerance, effort.steps)),
        inward=(before, after),
        latent=behind,
        # without a changed code the two points are one
        plane=plane(model, data.measuring, toward=rounded, across=box.found, tolerance=tolerance, size=effort.plane)
        if box.changed
        else None,
    )


def damage(model: nn.Module, losses: Losses, rounded: Point, *, settle: Losses) -> tuple[Damage, ...]:
    """Return what rounding each weight alone does, and what leaving it alone in float saves, the most harmful first.

    BatchNorm statistics are re-estimated on the data of `settle` every time, as they are for the loss after rounding everything.
    """
    found = []
    with staged(model, losses, rounded) as stage:

        def at(chosen: set[str]) -> float:
            stage.put(lambda name, base: weight(rounded[name], base) if name in chosen else base)
            return stage.settled(settle)

        every = set(rounded)
        together = at(every)
        for name, encoded in rounded.items():
            found.append(Damage(name, encoded.codes.numel(), at({name}) - stage.start, together - at(every - {name})))
    return tuple(sorted(found, key=lambda one: -one.alone))


def _flipped(found: Neighbours, data: Data, tolerance: float) -> Search:
    return Search(
        method="flip search",
        before=found.before - data.search_start,
        loss=found.loss - data.search_start,
        held_out_before=found.held_out_before - data.start,
        held_out=found.held_out - data.start,
        within=found.within and found.held_out - data.start <= tolerance,
        changed=found.changed,
        evaluations=found.cost.forward + found.cost.backward,
        history=tuple(value - data.search_start for value in found.history),
    )


def _trained(found: Trained, data: Data, tolerance: float, steps: int) -> Search:
    return Search(
        method="box QAT",
        before=found.before - data.search_start,
        loss=found.loss - data.search_start,
        held_out_before=found.held_out_before - data.start,
        held_out=found.held_out - data.start,
        within=found.within and found.held_out - data.start <= tolerance,
        changed=found.changed,
        evaluations=steps,
        history=tuple(value - data.search_start for _, value in found.history),
    )
