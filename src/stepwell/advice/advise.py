"""advise: which method is the cheapest that keeps a model's loss within a tolerance on each of several grids.

Rounding and GPTQ are measured, on batches that GPTQ was not calibrated on; what training would reach is forecast from them, because it
would cost a run to know. A grid is asked for no more than it needs: where rounding is enough, GPTQ is not run.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepwell.advice.early import FOUR_TERMS_STEP, Early, check_early, early_losses
from stepwell.advice.forecast import Coefficients, Estimate, Evidence, Tier, Trained, packaged
from stepwell.advice.measure import BatchLoss, Losses, Parts, divide, increase
from stepwell.advice.reasons import hit_rate, reasons
from stepwell.advice.verdict import Advice, Verdict, decide, safe
from stepwell.probes.directions import gaussian_noise, keys
from stepwell.probes.points import Move, dot
from stepwell.probes.stage import Cost, Stage, batchnorms, check_tolerance, staged
from stepwell.probes.width import Width, along
from stepwell.ptq.calibration import holders, uses
from stepwell.ptq.chosen import Chosen, chosen
from stepwell.ptq.gptq import gptq
from stepwell.quantizers import Encoded, Quantizer

DRAWS = 3  # directions of the width, as in the runs of the fit: on small networks one differs from the next by a factor of two
RATE = 1e-3  # of the training run that is forecast, unless said otherwise
Grid = Quantizer | Mapping[str, Quantizer | None]
Known = Mapping[Trained, tuple[Estimate, int]]  # what RTN and GPTQ leave, and the forward passes that it took to know


def advise(
    model: nn.Module,
    loss: BatchLoss,
    batches: Iterable[Any],
    *,
    quantizers: Sequence[Grid],
    tolerance: float = 0.1,
    calibration: Iterable[Any] | None = None,
    skip: Sequence[str] = (),
    rate: float = RATE,
    early: Early | None = None,
    measure: bool = True,
    seed: int = 0,
    on_step: Callable[[str], None] | None = None,
) -> Advice:
    """Return a verdict per quantizer: RTN is enough, GPTQ is enough, train, not reachable by training, or uncertain.

    The model is left exactly as found. One copy of the weights is held, and rounded ones tensor by tensor; GPTQ and an early training run
    hold what they need besides (`ptq.gptq`; codes, latent weights, their gradient and two moments). BatchNorm statistics are re-estimated
    for rounded weights on the batches that calibrate, as they should be in deployment; along the early run they stay.

    Args:
        model: any module, in float.
        loss: `loss(model, batch)` returns the mean loss of one batch as a tensor with one element, the same for the same weights.
        batches: data that the model was not trained on, in batches of equal size; several, so that an error can be given. A third of them
            calibrates GPTQ, the rest measures.
        quantizers: grids to judge, each as `ptq.rtn` takes it.
        tolerance: growth of the loss that is acceptable, above 0, in its unit. The forecast was fitted on cross entropies in nats; at a
            tolerance more than ten times away from those that it was judged at, it decides nothing: what is not measured is uncertain.
        calibration: other batches for GPTQ, for example training data; then all of `batches` measure.
        skip: names or patterns of parameters or modules to leave in float.
        rate: learning rate of the training run that is forecast, of Adam.
        early: `(train, steps)` runs a tenth of the training and forecasts from that: `train(model, step)` returns the loss on that step's
            training batch, `steps` is the length of the whole run.
        measure: False stops at the basin's width in one direction, which serves all grids: some 30 forward passes (40 at a tolerance other
            than that of the fit), no GPTQ, and wider intervals; otherwise three directions are averaged.
        seed: of the directions in which the width is measured.
        on_step: called with a few words whenever something has been done: show progress.

    Returns:
        The verdicts in the order of `quantizers`; prints as a table.

    Raises:
        TypeError: something of another kind where a quantizer, batches or a training function belong.
        ValueError: no quantizers, no batches, a loss that is not scalar, finite or deterministic, batches that never reach a layer (which
            is named), a tolerance or rate that is not positive, and what `ptq.gptq` refuses. All of it before anything is measured.

    >>> from stepwell.presets import int8
    >>> batches = torch.randn(6, 8, 16).split(1)
    >>> advise(nn.Linear(16, 4), lambda model, x: model(x).square().mean(), batches, quantizers=[int8(block=16)])[0].method
    'RTN'
    """
    check_tolerance(tolerance)
    check_early(early, rate, measure=measure)
    plans, parts = _plans(model, quantizers, skip), divide(batches, calibration)
    asked = _Asked(tolerance, float(rate), early, measure, seed, tuple(skip), on_step or (lambda words: None))
    return _advised(model, loss, parts, plans, asked)


def judge(
    model: nn.Module,
    loss: BatchLoss,
    parts: Parts,
    *,
    quantizers: Sequence[Grid],
    known: Sequence[Known],
    tolerance: float,
    skip: Sequence[str] = (),
) -> Advice:
    """Do as `advise` where RTN and GPTQ have been measured, on the same parts of the data: that is not done again.

    Args:
        model, loss, quantizers, tolerance, skip: as `advise`, checked before.
        parts: the data, divided.
        known: what was measured, grid by grid; what it took counts as the grid's cost.
    """
    plans = [plan._replace(known=one) for plan, one in zip(_plans(model, quantizers, skip), known, strict=True)]
    return _advised(model, loss, parts, plans, _Asked(tolerance, RATE, None, True, 0, tuple(skip), lambda words: None))


class _Plan(NamedTuple):
    """One grid: what it is called, as it was given, the weights that it takes, and what is known about it."""

    label: str
    quantizer: Grid
    rows: list[Chosen]
    known: Known


class _Asked(NamedTuple):
    """The options of a call."""

    tolerance: float
    rate: float
    early: Early | None
    measure: bool
    seed: int
    skip: tuple[str, ...]
    on_step: Callable[[str], None]


def _advised(model: nn.Module, loss: BatchLoss, parts: Parts, plans: Sequence[_Plan], asked: _Asked) -> Advice:
    """Judge every grid."""
    every = {row.name: row.parameter for plan in plans for row in plan.rows}
    losses, coefficients, tolerance = Losses(loss, parts.measuring), packaged(), asked.tolerance
    with staged(model, losses, every) as stage:
        base, rounded_only = list(losses.last), _check_reach(model, loss, parts, every)
        asked.on_step("loss of the float model")
        work = _Work(model, stage, losses, base, Losses(loss, parts.calibrating), loss, parts, rounded_only, coefficients, {})
        shared = stage.cost + Cost(1)  # the check of reach is one pass over all data
        verdicts = [_verdict(work, asked, plan) for plan in plans]
        widths = sum((width.cost for found in work.widths.values() for width in found), Cost(0))
    worth = hit_rate(coefficients.score(_tier(asked), tolerance), tolerance)
    return Advice(verdicts, shared=shared + widths, notes=[parts.note, *_settling(model, asked.measure), worth])


class _Work(NamedTuple):
    """What all grids share: the model on its stage, the loss of every measuring batch before, the widths that were measured so far.

    `losses` are those of the measuring batches, `settling` of the calibrating ones; `rounded_only` are weights that GPTQ cannot calibrate.
    """

    model: nn.Module
    stage: Stage
    losses: Losses
    base: list[float]
    settling: Losses
    loss: BatchLoss
    parts: Parts
    rounded_only: frozenset[str]
    coefficients: Coefficients
    widths: dict[tuple[frozenset[str], float], list[Width]]


def _plans(model: nn.Module, quantizers: Sequence[Grid], skip: Sequence[str]) -> list[_Plan]:
    """Return the grids with the weights they take, or refuse them."""
    if isinstance(quantizers, Quantizer | Mapping) or not isinstance(quantizers, Iterable):
        raise TypeError(f"`quantizers` must be a list of quantizers: got a {type(quantizers).__name__}. Write quantizers=[int4()].")
    given = list(quantizers)
    if not given:
        raise ValueError("`quantizers` must hold at least one grid: got none. Write quantizers=[int4(), int3()].")
    found = []
    for quantizer in given:
        rows = chosen(model, quantizer, skip=skip)
        grids = quantizer.values() if isinstance(quantizer, Mapping) else [quantizer]
        label = " + ".join(dict.fromkeys(str(grid) for grid in grids if grid is not None))
        found.append(_Plan(label, quantizer, rows, {}))
    return found


def _check_reach(model: nn.Module, loss: BatchLoss, parts: Parts, every: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Raise if some batches never reach a layer or have no loss; return the weights that GPTQ cannot calibrate (inside an attention)."""
    known: dict[str, list[nn.Module]] = {}
    for name, parameter in every.items():
        with suppress(ValueError):
            known |= holders(model, {name: parameter})

    def forward(model: nn.Module, batch: Any) -> None:
        value = loss(model, batch)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"`loss` must be finite on every batch: got {value.item()} on one that calibrates. Is it empty?")

    with torch.no_grad():
        for batches in [parts.measuring] if parts.calibrating is parts.measuring else [parts.calibrating, parts.measuring]:
            uses(model, known, batches, forward)
    return frozenset(every) - frozenset(known)


def _settling(model: nn.Module, measure: bool) -> list[str]:
    """Return what became of BatchNorm statistics, in words, where there are any."""
    if not measure or not batchnorms(model):
        return []
    return ["BatchNorm statistics of rounded weights are re-estimated on the calibrating batches; do so in deployment."]


def _verdict(work: _Work, asked: _Asked, plan: _Plan) -> Verdict:
    """Judge one grid."""
    before, known = work.stage.cost, set(work.widths)
    evidence, d20, uncounted, distance = _evidence(work, asked, plan)
    rho = _rho(work, asked, plan, distance, asked.tolerance)
    estimates, judged = work.coefficients.estimates(evidence), work.coefficients.judged(asked.tolerance)
    share = work.coefficients.shares[_tier(asked)]
    method, deciding = decide(estimates, asked.tolerance, share=share, forecasts=judged)
    shared = sum(width.cost.forward for key, found in work.widths.items() if key not in known for width in found)
    after = work.stage.cost
    said = reasons(
        estimates,
        evidence,
        asked.tolerance,
        work.coefficients,
        share=share,
        rho=rho,
        d20=d20,
        rounded_only=work.rounded_only.intersection(row.name for row in plan.rows),
        weights=sum(row.parameter.numel() for row in plan.rows),
    )
    return Verdict(
        method=method,
        predicted=deciding.increase,
        low=deciding.low,
        high=deciding.high,
        reasons=tuple(said),
        cost=Cost(after.forward - before.forward - shared + uncounted, after.backward - before.backward),
        grid=plan.label,
        tolerance=asked.tolerance,
        rho=rho,
        estimates=estimates,
        share=share,
        safe=safe(estimates, asked.tolerance, forecasts=judged),
        hit_rate=work.coefficients.score(_tier(asked), asked.tolerance).hits if judged else math.nan,
    )


def _evidence(work: _Work, asked: _Asked, plan: _Plan) -> tuple[Evidence, float | None, int, float]:
    """Return what is found out about one grid, the increase after 20 training steps, passes that the stage did not count, the distance."""
    distance, rtn, d20, passes = _round(work.stage, plan), None, None, 0
    if asked.measure:
        rtn, passes = plan.known.get("RTN") or (increase(work.stage, work.losses, work.base, "RTN", settle=work.settling), 0)
        asked.on_step(f"{plan.label}: RTN")
    evidence = Evidence(_rho(work, asked, plan, distance, work.coefficients.tolerance), asked.rate, rtn)
    if rtn is None or rtn.high <= asked.tolerance:
        return evidence, d20, passes, distance
    gptq, more = plan.known.get("GPTQ") or _gptq(work, asked, plan)
    evidence, passes = evidence._replace(gptq=gptq), passes + more
    if asked.early is None or gptq.high <= asked.tolerance:
        return evidence, d20, passes, distance
    train, steps = asked.early

    def look() -> float:
        return increase(work.stage, work.losses, work.base, "train").increase

    encoded = {row.name: row.quantizer.encode(work.stage.base[row.name]) for row in plan.rows}
    found = early_losses(work.stage, train, encoded, look, steps=steps, lr=asked.rate)
    asked.on_step(f"{plan.label}: early training")
    return evidence._replace(early=found[max(found)]), found.get(FOUR_TERMS_STEP), passes, distance


def _round(stage: Stage, plan: _Plan) -> float:
    """Round the model's weights to a grid, tensor by tensor, and return how far that is."""
    grids, squares = {row.name: row.quantizer for row in plan.rows}, []

    def rounded(name: str, base: Tensor) -> Tensor:
        if name not in grids:
            return base
        found = grids[name](base)
        away = found - base
        squares.append(dot(away, away))
        return found

    stage.put(rounded)
    return math.sqrt(math.fsum(squares))


def _rho(work: _Work, asked: _Asked, plan: _Plan, distance: float, tolerance: float) -> float:
    """Return rho_fn as `probes.rho_fn` defines it; widths are measured once for all grids on the same weights."""
    stage, axes = work.stage, {row.name: row.quantizer.axis for row in plan.rows}
    names = frozenset(axes)
    if (names, tolerance) not in work.widths:
        found: list[Width] = []
        for key in keys(asked.seed, DRAWS if asked.measure else 1):
            near = found[-1].radius if found else _elsewhere(work.widths, names, tolerance)
            found.append(along(stage, _within(names, gaussian_noise(axes, key)), tolerance, near=near))
            asked.on_step("width of the basin")
        work.widths[names, tolerance] = found
    return statistics.fmean(distance / width.radius for width in work.widths[names, tolerance])


def _elsewhere(widths: Mapping[tuple[frozenset[str], float], list[Width]], names: frozenset[str], tolerance: float) -> float | None:
    """Return about what a radius will be, from one at another tolerance, as in a quadratic bowl; None if there is none."""
    return next((found[0].radius * math.sqrt(tolerance / other) for (same, other), found in widths.items() if same == names), None)


def _gptq(work: _Work, asked: _Asked, plan: _Plan) -> tuple[Estimate, int]:
    """Return what GPTQ leaves and the passes that calibrated it; weights that it cannot calibrate are rounded to nearest first."""
    nearest = {row.name: row.quantizer for row in plan.rows if row.name in work.rounded_only}
    work.stage.put(lambda name, base: nearest[name](base) if name in nearest else base)
    calls, count = 0, len(plan.rows) - len(nearest)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return work.loss(model, batch)

    def done(name: str, _: Encoded) -> None:
        asked.on_step(f"{plan.label}: GPTQ, {name}")

    if count:
        skip = [*asked.skip, *nearest]
        gptq(work.model, plan.quantizer, work.parts.calibrating, skip=skip, forward=forward, on_layer=done)
    found = increase(work.stage, work.losses, work.base, "GPTQ", settle=work.settling)
    return found, math.ceil(calls / len(work.parts.calibrating))


def _within(names: Collection[str], move: Move) -> Move:
    """Return a displacement of these weights alone."""
    return lambda name, base: move(name, base) if name in names else torch.zeros_like(base)


def _tier(asked: _Asked) -> Tier:
    """Return what the verdicts are made from."""
    if not asked.measure:
        return "width"
    return "early" if asked.early is not None else "probes"
