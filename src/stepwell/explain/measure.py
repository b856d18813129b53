"""measure: why rounding fails on a model, grid by grid, and what will work, as records that a page or a program can read."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from stepwell.advice.advise import Known, judge
from stepwell.advice.forecast import Estimate
from stepwell.advice.measure import BatchLoss, Losses, Parts, divide
from stepwell.advice.verdict import Advice
from stepwell.explain.closer import Data, look
from stepwell.explain.effort import NORMAL, Effort
from stepwell.explain.records import Closer, Explanation, GridReport, Left, Rounded
from stepwell.explain.rounding import Point, compare, curvature, gptq_point, spread, without_data
from stepwell.explain.tally import Progress, Tally
from stepwell.presets import intn
from stepwell.probes.rho import Ratio, rho_self, rho_uniform
from stepwell.probes.segment import Segment, segment
from stepwell.probes.stage import batchnorms, check_tolerance, staged
from stepwell.ptq.calibration import holders, uses
from stepwell.ptq.chosen import Chosen, chosen
from stepwell.quantizers import Quantizer
from stepwell.selection import select


def measure(
    model: nn.Module,
    loss: BatchLoss,
    batches: Iterable[Any],
    *,
    quantizers: Sequence[Quantizer],
    tolerance: float = 0.1,
    effort: Effort = NORMAL,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> Explanation:
    """Measure why rounding fails on each grid, what lies near, and which method will reach the tolerance.

    A third of the batches calibrates GPTQ, weighs the scale search and guides the searches; every reported loss is of the others, unless it
    says otherwise. The model is left exactly as found. Held at a time: two copies of the weights, the codes of every grid twice (one byte
    each per weight), and in the closer look what training takes.

    Args:
        model: any module, in float.
        loss: `loss(model, batch)` returns the mean loss of one batch as a tensor with one element, the same for the same weights.
        batches: data that the model was not trained on, of equal size; three or more, so that searches meet new data and errors are known.
        quantizers: the grids.
        tolerance: growth of the loss that still counts as good, above 0, in its unit.
        effort: how much is measured.
        skip: names or patterns of parameters or modules to leave in float.
        progress: called with the part and the passes so far at every batch.

    Returns:
        Losses after rounding, ratios, lines and a verdict for every grid; a closer look for the widest grid of every scheme on which
        rounding fails (the narrowest if it never does); what it took.

    Raises:
        TypeError: something of another kind where a quantizer, batches or a loss belong.
        ValueError: no quantizers, no batches, a loss that is not scalar, finite, deterministic and differentiable, batches that never reach
            a layer (which is named), nothing to quantize, a tolerance that is not positive. All of it before anything is measured.
    """
    check_tolerance(tolerance)
    grids, parts = _plans(model, quantizers, skip), divide(batches, None)
    tally = Tally(len(parts.measuring) + (0 if parts.calibrating is parts.measuring else len(parts.calibrating)), progress)
    counted = tally.counted(loss)
    names = list(dict.fromkeys(row.name for grid in grids for row in grid.rows))
    with tally.part("checks"):
        data, base, beyond = _checked(model, counted, parts, grids[0].rows, names)
    asked = _Asked(tolerance, effort, beyond)
    with _collected() as warned:
        found = _all_rounded(model, data, grids, tally, asked, names)
    ratios = _ratios(model, data, [one.points["RTN"] for one in found], tally, asked)
    with tally.part("lines"):
        lines = [segment(model, data.measuring, toward=one.points["RTN"], positions=effort.positions) for one in found]
    closer = _closer(model, data, grids, found, tally, asked)
    with tally.part("advice"):
        advice = judge(model, counted, parts, quantizers=quantizers, known=_known(found), tolerance=tolerance, skip=skip)
    return Explanation(
        tolerance=tolerance,
        start=data.start,
        start_stderr=spread(base),
        search_start=data.search_start,
        weights=sum(row.parameter.numel() for row in grids[0].rows),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=len(grids[0].rows),
        floats=_floats(model, skip),
        batches=(len(parts.calibrating), len(parts.measuring)),
        held_out=parts.calibrating is not parts.measuring,
        settled=bool(batchnorms(model)),
        grids=tuple(_reports(grids, found, ratios, lines, advice, closer)),
        worth=advice.notes[-1],
        notes=(parts.note, *_notes(model, beyond), *warned),
        spent=tally.spent,
        effort=effort.name,
    )


def scheme(quantizer: Quantizer) -> str:
    """Return how a grid's scales are made, in a word that grids of other bits share: "channel-mse"; of unusual grids, all they are.

    >>> scheme(intn(4, block="channel", scale="mse")), scheme(intn(2, block=32))
    ('channel-mse', 'block32-absmax')
    """
    block = {None: "tensor", "channel": "channel"}.get(quantizer.block, f"block{quantizer.block}")  # type: ignore[arg-type]
    bits, rule = quantizer.format.bits, quantizer.rule
    usual = quantizer.format.levels == "symmetric" and quantizer == intn(bits, block=quantizer.block, scale=rule)
    return f"{block}-{rule}" if usual else str(quantizer)


class _Plan(NamedTuple):
    """One grid and the weights that it takes."""

    quantizer: Quantizer
    rows: list[Chosen]


class _Asked(NamedTuple):
    """What all grids share."""

    tolerance: float
    effort: Effort
    beyond: frozenset[str]


class _Found(NamedTuple):
    """One grid's points and what they lose."""

    points: dict[str, Point]
    rounded: tuple[Rounded, ...]


def _plans(model: nn.Module, quantizers: Sequence[Quantizer], skip: Sequence[str]) -> list[_Plan]:
    """Return the grids with the weights they take, or refuse them."""
    if not isinstance(quantizers, Sequence) or not all(isinstance(one, Quantizer) for one in quantizers):
        raise TypeError(f"`quantizers` must be a list of quantizers: got {quantizers!r}. Write quantizers=[int4()].")
    if not quantizers:
        raise ValueError("`quantizers` must hold at least one grid: got none. Write quantizers=[int4(), int3()].")
    return [_Plan(quantizer, chosen(model, quantizer, skip=skip)) for quantizer in quantizers]


def _checked(
    model: nn.Module, loss: BatchLoss, parts: Parts, rows: Sequence[Chosen], names: Sequence[str]
) -> tuple[Data, list[float], frozenset[str]]:
    """Return the data with its float losses, the loss of every measuring batch, and the weights that GPTQ cannot calibrate."""
    searching, measuring = Losses(loss, parts.calibrating), Losses(loss, parts.measuring)
    known: dict[str, list[nn.Module]] = {}
    for row in rows:
        try:
            known |= holders(model, {row.name: row.parameter})
        except ValueError:
            continue
    with staged(model, measuring, names) as stage:
        start, base = stage.start, list(measuring.last)
        if known:
            uses(model, known, parts.calibrating, loss)
        stage.gradient(lambda model: loss(model, parts.measuring[0]))
        search_start = start if parts.calibrating is parts.measuring else stage.other(searching)
        if not math.isfinite(search_start):
            raise ValueError(f"`loss` must be finite on every batch: got {searching.last} on those that calibrate. Is one of them empty?")
    data = Data(loss, parts.calibrating, searching, measuring, start, search_start)
    return data, base, frozenset(names) - frozenset(known)


def _all_rounded(model: nn.Module, data: Data, grids: Sequence[_Plan], tally: Tally, asked: _Asked, names: Sequence[str]) -> list[_Found]:
    """Round to every grid in every way, and measure what that loses."""
    with tally.part("scale search"):
        cost = curvature(model, data.loss, data.search, names)
    found = []
    for grid in grids:
        with tally.part("scale search"):
            points = without_data(grid.rows, cost)
        with tally.part("GPTQ"):
            calls = tally.calls
            points["GPTQ"] = gptq_point(model, grid.rows, points["RTN"], data.search, data.loss, asked.beyond)
            passes = math.ceil((tally.calls - calls) / len(data.search))
        with tally.part("losses"):
            rounded = compare(model, data.measuring, points, asked.tolerance, settle=data.searching, before={"GPTQ": passes})
        found.append(_Found({method: points[method] for method in ("RTN", "GPTQ")}, rounded))
    return found


def _ratios(model: nn.Module, data: Data, points: Sequence[Point], tally: Tally, asked: _Asked) -> list[tuple[Ratio, Ratio]]:
    """Return rho_uniform and rho_self of every grid; rho_fn comes with the verdicts."""
    found = []
    with tally.part("ratios"):
        for point in points:
            even = rho_uniform(model, data.measuring, toward=point, tolerance=asked.tolerance, draws=asked.effort.draws)
            found.append((even, rho_self(model, data.measuring, toward=point, tolerance=asked.tolerance)))
    return found


def _known(found: Sequence[_Found]) -> list[Known]:
    """Return what the verdict need not measure again, grid by grid."""
    return [
        {
            "RTN": (Estimate("RTN", rtn.increase, rtn.low, rtn.high, True), rtn.forward),
            "GPTQ": (Estimate("GPTQ", gptq.increase, gptq.low, gptq.high, True), gptq.forward),
        }
        for rtn, *_, gptq in (one.rounded for one in found)
    ]


def _closer(
    model: nn.Module, data: Data, grids: Sequence[_Plan], found: Sequence[_Found], tally: Tally, asked: _Asked
) -> dict[int, Closer]:
    """Return the closer looks by the index of their grid."""
    looks = {}
    for index in _worth(grids, found, asked.effort):
        points = found[index].points
        with tally.part("closer look"):
            looks[index] = look(model, data, points["RTN"], points["GPTQ"], tolerance=asked.tolerance, effort=asked.effort)
    return looks


def _worth(grids: Sequence[_Plan], found: Sequence[_Found], effort: Effort) -> list[int]:
    """Return which grids get a closer look: of each scheme the widest on which rounding fails, or all such; the narrowest if none does."""
    chosen = []
    for name in dict.fromkeys(scheme(grid.quantizer) for grid in grids):
        mine = sorted(
            (index for index, grid in enumerate(grids) if scheme(grid.quantizer) == name), key=lambda k: -grids[k].quantizer.format.bits
        )
        failing = [index for index in mine if not found[index].rounded[0].within]
        chosen += failing[: None if effort.every else 1] or mine[-1:]
    return chosen


def _reports(
    grids: Sequence[_Plan],
    found: Sequence[_Found],
    ratios: Sequence[tuple[Ratio, Ratio]],
    lines: Sequence[Segment],
    advice: Advice,
    closer: dict[int, Closer],
) -> list[GridReport]:
    """Return one report per grid."""
    return [
        GridReport(
            scheme(grid.quantizer),
            grid.quantizer.format.bits,
            str(grid.quantizer),
            found[k].rounded,
            *ratios[k],
            lines[k],
            advice[k],
            closer.get(k),
        )
        for k, grid in enumerate(grids)
    ]


def _floats(model: nn.Module, skip: Sequence[str]) -> tuple[Left, ...]:
    """Return the parameters that stay in float."""
    return tuple(Left(row.name, row.parameter.numel(), row.reason) for row in select(model, True, skip=skip) if row.choice is None)


@contextmanager
def _collected() -> Iterator[list[str]]:
    """Give what is warned about a Hessian inside as sentences afterwards; other warnings go their way then."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        yield found
    for one in caught:
        text = str(one.message)
        if text.startswith("the Hessian of"):
            found += [text[0].upper() + text[1:]] if text[0].upper() + text[1:] not in found else []
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _notes(model: nn.Module, beyond: frozenset[str]) -> list[str]:
    """Return what a reader of the numbers must know."""
    notes = []
    if batchnorms(model):
        notes.append(
            "BatchNorm statistics are re-estimated on the calibrating batches for the losses after rounding and the damage of single "
            "weights, as they should be in deployment, and frozen in lines, widths, searches and slices."
        )
    if beyond:
        notes.append(f"GPTQ cannot calibrate {', '.join(sorted(beyond))}: these are rounded to nearest in its place.")
    return notes
