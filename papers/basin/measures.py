"""What is measured on one network and grid, as rows of the tables that `runs.py` fills. Running it does nothing.

Increases are losses minus the float network's on the same samples. BatchNorm: final numbers (`rtn`, `search`, `gptq`, `qat`, `control`,
`lotion`, `increase` of a search) re-estimate the statistics on the calibration inputs for the weights in place, as the float network's
were; everything along the way (ratios, slices, gradients, losses during training, latent weights) keeps the float network's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from tables import Row
from torch import Tensor, nn
from training import Grid, frozen, holding, on_grid, train

import stepwell as sw
from stepwell.blocks import from_blocks, to_blocks
from stepwell.methods.base import Method
from stepwell.probes.width import Width
from stepwell.ptq.calibration import holders, run_batch, second_moment, uses
from stepwell.quantizers import Encoded, Quantizer

TOLERANCE = 0.1  # nats
EARLY = {"d20": 20, "d5": 12, "d10": 24}  # steps: 20, and 5 % and 10 % of 240
MIDDLE_RATE = 1e-3  # at which a run is looked into
LOTION = {"frozen": (10.0, 3e-3), "refitted": (1.0, 1e-2)}  # scales -> strength and rate, chosen on digits networks of other seeds
Weights = Mapping[str, Encoded | Tensor]


class Base(NamedTuple):
    """Losses of the float network, sample by sample."""

    validation: Tensor
    test: Tensor


class Gain(NamedTuple):
    """Increase of the mean loss over the float network's, its standard error over samples, and the increase on test data."""

    value: float
    error: float
    held_out: float


def base(grid: Grid) -> Base:
    return Base(grid.subject.each(grid.model, "validation"), grid.subject.each(grid.model, "test"))


def final(grid: Grid, weights: Weights, start: Base) -> Gain:
    """Return what weights cost, with BatchNorm statistics re-estimated for them."""
    model = holding(grid.model, weights)
    grid.subject.settle_(model)
    change = grid.subject.each(model, "validation") - start.validation
    return Gain(
        float(change.mean()), float(change.std() / math.sqrt(len(change))), float((grid.subject.each(model, "test") - start.test).mean())
    )


def along_the_way(grid: Grid, weights: Weights) -> float:
    """Return the validation loss of weights with the float network's statistics."""
    return float(grid.subject.each(holding(grid.model, weights), "validation").mean())


def searched(grid: Grid) -> dict[str, Encoded]:
    """Round to nearest with scales searched for the error of a layer's output: squared errors weigh as the mean square of their input."""
    names = {name: grid.model.get_parameter(name) for name in grid.centre}
    inputs, found = grid.subject.inputs(), {}
    reached = uses(grid.model, holders(grid.model, names), inputs, run_batch)
    with torch.no_grad():
        for name, one in grid.centre.items():
            moment = second_moment(grid.model, reached[name], inputs, run_batch)
            square = moment.diagonal(dim1=1, dim2=2).reshape(-1)
            shape, axis = tuple(names[name].shape), one.quantizer.axis
            rows = to_blocks(names[name], "channel", axis)
            curvature = from_blocks(square.expand_as(rows).contiguous(), shape, "channel", axis)
            found[name] = one.quantizer.encode(names[name], scale=sw.ptq.scale_search(names[name], one.quantizer, curvature))
    return found


def calibrated(grid: Grid) -> dict[str, Encoded]:
    """Round with GPTQ on training inputs; the scales are those of rounding to nearest."""
    return sw.ptq.gptq(holding(grid.model, {}), grid.quantizer, grid.subject.inputs(), skip=grid.subject.skip)


def ratios(grid: Grid, widths: Sequence[Width], coarse: Width, points: Mapping[str, Weights], *, draws: int) -> Row:
    """Return D2 and D3, and the losses of rounded weights along the way.

    Args:
        grid: the network on its grid.
        widths: of random directions, which serve every grid.
        coarse: of the way to the weights rounded to 3 bits in the same scheme.
        points: name -> rounded weights.
        draws: of uniform noise.
    """
    loss, toward = grid.subject.on("validation"), grid.centre
    uniform = sw.probes.rho_uniform(grid.model, loss, toward=toward, tolerance=TOLERANCE, draws=draws)
    second = sw.probes.exact_quadratic(grid.model, loss, toward=toward)
    given = [sw.probes.rho_fn(grid.model, loss, toward=toward, tolerance=TOLERANCE, width=width).value for width in widths]
    return {
        "rho_self": sw.probes.rho_self(grid.model, loss, toward=toward, tolerance=TOLERANCE).value,
        "rho_uniform": uniform.value,
        "rho_uniform_se": uniform.stderr,
        "rho_fn": sum(given) / len(given),
        "rho_fn_least": min(given),
        "rho_fn_most": max(given),
        "rho_cross": sw.probes.rho_cross(grid.model, loss, toward=toward, coarse=toward, tolerance=TOLERANCE, width=coarse).value,
        "slope": second.slope,
        "curvature": second.curvature,
        "quadratic": second.predicted,
        **{f"{name}_frozen": along_the_way(grid, weights) - second.start for name, weights in points.items()},
    }


class Trained(NamedTuple):
    """What a training run gave: its row for runs.csv, its latent weights, the codes they round to, and its log of D4."""

    row: Row
    latent: dict[str, Tensor]
    found: dict[str, Encoded]
    inward: list[Row]


def qat(grid: Grid, start: Base, data: Sequence[Any], rate: float) -> Trained:
    """Train straight through on the frozen grid; at the middle rate, log the inward component at 0, 1, 2, 4, .. steps."""
    subject, first, early, log = grid.subject, float(start.validation.mean()), {}, []
    original = {name: grid.model.get_parameter(name).detach() for name in grid.centre}

    def deployed(step: int, model: nn.Module, run: Any) -> None:
        early[step] = float(subject.each(model, "validation").mean()) - first

    def inward(step: int, model: nn.Module, run: Any) -> None:
        with run.latent():
            latent = {name: model.get_parameter(name).detach() for name in grid.centre}
            point = sw.probes.inward(
                model, subject.on("validation"), at=on_grid(latent, grid.centre), toward=original, baseline=first, tolerance=TOLERANCE
            )
        log.append({"k": step, **{name: value for name, value in asdict(point).items() if name != "cost"}})

    looks: dict[int, Callable[..., None]] = dict.fromkeys(EARLY.values(), deployed)
    if rate == MIDDLE_RATE:
        looks |= dict.fromkeys([0, len(data), *(1 << power for power in range(len(data).bit_length()))], inward)
    latent = train(subject, grid.model, list(grid.centre), frozen(sw.ste(grid.quantizer)), data, rate=rate, looks=looks)
    found = on_grid(latent, grid.centre)
    gain = final(grid, found, start)
    end = sw.probes.latent(holding(grid.model, latent), subject.on("validation"), at=found, start=original)
    row: Row = {
        "rate": rate,
        "steps": len(data),
        **{name: early[step] for name, step in EARLY.items()},
        "qat": gain.value,
        "qat_se": gain.error,
        "qat_heldout": gain.held_out,
        "latent": end.latent_loss - first,
        "changed": end.changed,
        "within_one": end.near,
    }
    return Trained(row, latent, found, log)


def latents(grid: Grid, trained: Trained) -> Row:
    """Return D7 at the end of a run."""
    original = {name: grid.model.get_parameter(name).detach() for name in grid.centre}
    point = sw.probes.latent(holding(grid.model, trained.latent), grid.subject.on("validation"), at=trained.found, start=original)
    return {name: value for name, value in asdict(point).items() if name != "cost"}


def profiles(grid: Grid, rounded: Mapping[str, Weights], end: Weights) -> list[Row]:
    """Return D1: lines from the float weights to rounded and trained ones, and from rounding to nearest to the trained ones."""
    loss, rows = grid.subject.on("validation"), []
    positions = tuple(k / 10 for k in range(16))
    lines = {name: sw.probes.segment(grid.model, loss, toward=weights, positions=positions) for name, weights in rounded.items()}
    lines["rtn-qat"] = sw.probes.segment(grid.model, loss, start=grid.centre, toward=end, positions=positions[:11])
    for name, line in lines.items():
        losses = dict(zip(line.positions, line.losses, strict=True))
        rows.append(
            {
                "line": name,
                "barrier": line.barrier,
                "defect": line.defect,
                "exponent": line.exponent,
                **{f"S{a:g}": losses.get(a) for a in positions},
            }
        )
    return rows


def near(grid: Grid, start: Base, data: Sequence[Any], *, rounds: int) -> list[Row]:
    """Return D5: a search over flips on validation data, judged on test data, and box QAT on training batches."""
    loss = grid.subject.on("validation")
    box = sw.probes.box_qat(
        grid.model,
        loss,
        around=grid.centre,
        train=lambda model, step: grid.subject.loss(model, data[step]),
        steps=len(data),
        lr=MIDDLE_RATE,
        tolerance=TOLERANCE,
    )
    flip = sw.probes.neighbours(grid.model, loss, around=grid.centre, tolerance=TOLERANCE, rounds=rounds)
    rows: list[Row] = []
    for name, end in (("box", box), ("flip", flip)):
        gain = final(grid, end.found, start)
        rows.append(
            {
                "search": name,
                "increase": gain.value,
                "increase_se": gain.error,
                "increase_heldout": gain.held_out,
                "within": end.within,
                "changed": end.changed,
                "forward": end.cost.forward,
                "backward": end.cost.backward,
            }
        )
    return rows


def lotion(grid: Grid, start: Base, data: Sequence[Any], straight: Row) -> list[Row]:
    """Return LOTION without a straight-through gradient beside QAT: scales frozen, and where they are absmax, with scales that follow.

    Args:
        grid: the network on its grid.
        start: its float losses.
        data: batches.
        straight: the row of QAT at the middle rate on the frozen grid.
    """
    rows: list[Row] = []
    for scales in LOTION if grid.quantizer.rule == "absmax" else ("frozen",):
        strength, rate = LOTION[scales]
        method = sw.lotion(grid.quantizer, strength=strength, loss_terms=grid.subject.loss_terms)
        gain, latent = _lotion(grid, start, data, method if scales == "refitted" else frozen(method), rate)
        qat = {"ste": straight["qat"], "ste_heldout": straight["qat_heldout"]}
        if scales == "refitted":
            other, _ = _lotion(grid, start, data, sw.ste(grid.quantizer), MIDDLE_RATE)
            qat = {"ste": other.value, "ste_heldout": other.held_out}
        rows.append(
            {
                "scales": scales,
                "strength": strength,
                "rate": rate,
                "steps": len(data),
                "lotion": gain.value,
                "lotion_se": gain.error,
                "lotion_heldout": gain.held_out,
                "latent": latent,
                **qat,
            }
        )
    return rows


def _lotion(grid: Grid, start: Base, data: Sequence[Any], method: Method, rate: float) -> tuple[Gain, float]:
    """Train, round as the method's scales ask, and return what that costs and the increase at the latent weights."""
    latent = train(grid.subject, grid.model, list(grid.centre), method, data, rate=rate)
    found = refitted(latent, grid.centre) if method.init is None else on_grid(latent, grid.centre)
    return final(grid, found, start), along_the_way(grid, latent) - float(start.validation.mean())


class Floated(NamedTuple):
    """Weights after float training with the budget of QAT, and what they cost before they are rounded."""

    weights: dict[str, Tensor]
    gain: Gain


def control(grid: Grid, start: Base, floated: Floated, rate: float, steps: int) -> Row:
    """Return D8: float weights trained as long, rounded with the frozen scales and with refitted ones."""
    rounded, again = (final(grid, weigh(floated.weights, grid.centre), start) for weigh in (on_grid, refitted))
    return {
        "rate": rate,
        "steps": steps,
        "trained": floated.gain.value,
        "trained_heldout": floated.gain.held_out,
        "control": rounded.value,
        "control_heldout": rounded.held_out,
        "refitted": again.value,
        "refitted_heldout": again.held_out,
    }


def refitted(weights: Mapping[str, Tensor], centre: Mapping[str, Encoded]) -> dict[str, Encoded]:
    """Return weights rounded to nearest with scales of their own."""
    return {name: one.quantizer.encode(weights[name]) for name, one in centre.items()}


def grid_of(subject: Any, model: nn.Module, quantizer: Quantizer) -> Grid:
    return Grid(subject, model, quantizer, sw.probes.rounded(model, quantizer, skip=subject.skip))
