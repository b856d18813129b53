"""Runs: the table of single runs, which grows row by row so that a stopped comparison goes on where it was. Running it does nothing.

A method's learning rate is chosen at every width, on the validation part with the data of seed 0; what is reported are the test losses
of other seeds.
"""

import csv
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import stepwell as sw
from estimating.lab import BLOCK, ROOT, SKIP, Lab
from estimating.methods import Arm, Finished

RESULTS = ROOT / "benchmarks" / "results"
CHOOSING_SEED, SEEDS, DRAWS = 0, (1, 2, 3), 3


class Run(NamedTuple):
    """One run: losses in nats per byte, the most levels that a block of 64 weights holds, and seconds of one core.

    `rr` is the mean over three draws of randomized rounding of the latent weights, `latent` their own loss; NaN where there are none,
    and in runs that choose a rate.
    """

    method: str
    bits: float
    rate: float
    seed: int
    split: str
    rtn: float
    rr: float
    latent: float
    levels: int
    seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """What a run is found by."""
        return self[:5]


class Table:
    """Runs in a file, written after every one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[Run] = []
        if path.exists():
            with path.open(newline="") as file:
                self.runs = [_typed(row) for row in csv.DictReader(file)]

    def add(self, run: Run) -> None:
        """Append a run."""
        self.runs.append(run)
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(Run._fields)
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in run])

    def of(self, method: str, bits: float, split: str) -> list[Run]:
        """Return the runs of a method at a width, by rate and seed."""
        found = [run for run in self.runs if (run.method, run.bits, run.split) == (method, bits, split)]
        return sorted(found, key=lambda run: (run.rate, run.seed))

    def chosen(self, method: str, bits: float, arm: Arm) -> float | None:
        """Return the rate with the least validation loss at a width, a diverged run counting as infinite; None before all were tried.

        Where there is only one it needs no try, where there is none it is 0.
        """
        if len(arm.rates) < 2:
            return arm.rates[0] if arm.rates else 0.0
        tried = {run.rate: run.rtn for run in self.of(method, bits, "validation") if run.seed == CHOOSING_SEED}
        if any(rate not in tried for rate in arm.rates):
            return None
        return min(arm.rates, key=lambda rate: math.inf if math.isnan(tried[rate]) else tried[rate])

    def reported(self, method: str, bits: float, arm: Arm) -> list[Run]:
        """Return the test runs at the chosen rate, one per seed."""
        rate = self.chosen(method, bits, arm)
        return [run for run in self.of(method, bits, "test") if run.rate == rate]


def fill(table: Table, lab: Lab, name: str, arm: Arm, bits: float) -> Iterable[Run]:
    """Make the runs of an arm at a width that are not there, one at a time: first those that choose the rate."""
    there = {run.key for run in table.runs}
    for rate in arm.rates if len(arm.rates) > 1 else ():
        if (name, bits, rate, CHOOSING_SEED, "validation") not in there:
            yield made(table, lab, (name, bits, rate, CHOOSING_SEED, "validation"), arm)
    best = table.chosen(name, bits, arm)
    assert best is not None
    for seed in SEEDS:
        if (name, bits, best, seed, "test") not in there:
            yield made(table, lab, (name, bits, best, seed, "test"), arm)


def made(table: Table, lab: Lab, key: tuple[str, float, float, int, str], arm: Arm) -> Run:
    """Train, measure and enter one run."""
    name, bits, rate, seed, split = key
    begin = time.process_time()
    finished = arm.start(lab, bits, rate, seed)
    seconds = time.process_time() - begin
    rtn, levels = lab.loss(finished.model, split), most_levels(finished.model)
    rr, latent = under_randomized_rounding(lab, finished, split) if split == "test" else (math.nan, math.nan)
    run = Run(name, bits, rate, seed, split, rtn, rr, latent, levels, seconds)
    table.add(run)
    return run


def under_randomized_rounding(lab: Lab, finished: Finished, split: str) -> tuple[float, float]:
    """Return the mean loss over draws of randomized rounding, and that of the latent weights."""
    if finished.latents is None or finished.encoded is None:
        return math.nan, math.nan
    held = dict(finished.model.named_parameters())
    generator, losses = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _ in range(DRAWS):
            for name, encoded in finished.encoded.items():
                scales = encoded.scales if encoded.tensor_scale is None else encoded.scales * encoded.tensor_scale
                held[name].copy_(encoded.quantizer(finished.latents[name], scale=scales, rounding=sw.stochastic(generator)))
            losses.append(lab.loss(finished.model, split))
        for name in finished.encoded:
            held[name].copy_(finished.latents[name])
    return sum(losses) / DRAWS, lab.loss(finished.model, split)


def most_levels(model: nn.Module) -> int:
    """Return the most distinct values that a block of a quantized weight holds: at most 2^bits on a grid, about 64 in float."""
    found = [layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in SKIP]
    return max(len(row.unique()) for weight in found for row in weight.detach().view(-1, BLOCK))


def _typed(row: dict[str, str]) -> Run:
    """Return a run from its fields."""
    kinds = Run.__annotations__
    return Run(**{name: kinds[name](value) for name, value in row.items()})
