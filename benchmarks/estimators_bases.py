"""Is the base of `estimators.py` as hard to quantize as the one that our goals were measured on? Reference rows of other bases beside it.

    python benchmarks/estimators_bases.py [--only VARIANT] [--table] [--after]

The goals (nats above full precision at 4, 3 and 2 bits) come from a trial whose protocol leaves details of the base open: initial weights,
biases, norm, weight decay, text. Every variant changes such details; its rows are full precision at two rates, rounding by absolute
maximum and at searched scales, and plain straight-through training, seed 0, validation part. Compared are residuals, since the texts
differ. `distance` is the root mean square over twelve rows of log(residual here / residual in the trial); the default recipe is not run
here, so that a base cannot be chosen for it. Results: results/estimators_bases.csv. A quarter of an hour of one core.

`--after`, once the base is chosen: the default and torchao's PARQ on some of the bases, at the rate that both have in the comparison, into
results/estimators_bases_after.csv: how much of a residual is the base's.
"""

import argparse
import copy
import csv
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from estimating.lab import LENGTH, Base, Lab
from estimating.methods import arms, grid, ours
from estimating.peers import peers
from estimating.runs import RESULTS
from torch import nn
from torch.optim import AdamW, Optimizer

import stepwell as sw
from stepwell.train.transformer import byte_transformer

RATES = (1.5e-3, 3e-3)
WIDTHS = (4, 3, 2)
ROUNDINGS = (("rtn, absmax", "sym", "absmax"), ("rtn, searched, sym", "sym", "mse"), ("rtn, searched, full", "full", "mse"))
TRIAL = {  # loss in the trial by row and width; the first two are full precision
    ("full precision", 1.5e-3, 32): 1.6281,
    ("full precision", 3e-3, 32): 1.6317,
    **{("rtn, absmax", 3e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6513, 1.7708, 3.1531), strict=True)},
    **{("rtn, searched, sym", 1.5e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6504, 1.7326, 2.3649), strict=True)},
    **{("rtn, searched, full", 1.5e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6434, 1.6963, 2.0174), strict=True)},
    **{("ste", 1.5e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6352, 1.6566, 1.8173), strict=True)},
}
AFTER_RATE = 2.2e-3
AFTER = {  # of the trial: means of three seeds
    ("full precision", AFTER_RATE, 32): 1.6284,
    **{("default", AFTER_RATE, bits): loss for bits, loss in zip((3, 2), (1.6381, 1.6641), strict=True)},
    **{("torchao parq", AFTER_RATE, bits): loss for bits, loss in zip((3, 2), (1.6432, 1.6738), strict=True)},
}
AFTER_BASES = ("ours", "linear N(0, .02)")
Key = tuple[str, float, int]


class Entry(NamedTuple):
    """One loss of one base, nats per byte."""

    variant: str
    row: str
    rate: float
    bits: int
    loss: float
    trial: float


def changed(change: Callable[[nn.Module], None], **sizes: int) -> Callable[[], nn.Module]:
    """Return a builder of our network that changes it before training."""

    def build() -> nn.Module:
        model = byte_transformer(length=LENGTH, seed=0, **sizes)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            change(model)
        return model

    return build


def small_normal(model: nn.Module, *, residual: bool = False) -> None:
    """Draw all weights from a normal of .02, biases zero, as GPT-2 does; on request less where a residual is written."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02 / (6**0.5 if residual and name.endswith(("out", "down")) else 1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def wide_embedding(model: nn.Module) -> None:
    """Draw embeddings from the unit normal, as torch does."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight)


def fan_in(model: nn.Module) -> None:
    """Draw Linear weights from a normal of variance 1 / inputs, biases zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)


def bare(model: nn.Module) -> None:
    """Take the biases away."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.bias = None


def rms_norm(model: nn.Module) -> None:
    """Put RMSNorm in the place of LayerNorm."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.LayerNorm):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.RMSNorm(layer.normalized_shape[0]))


def both(*changes: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Return all changes, one after the other."""

    def change(model: nn.Module) -> None:
        for one in changes:
            one(model)

    return change


def matrices_decay(model: nn.Module, rate: float) -> Optimizer:
    """Return AdamW that decays matrices alone."""
    groups = [
        {"params": [one for one in model.parameters() if (one.dim() > 1) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    return AdamW(groups, lr=rate, betas=(0.9, 0.95))


def variants() -> dict[str, Base]:
    """Return the bases by name, ours first."""
    built = {
        "embeddings N(0, 1)": wide_embedding,
        "linear N(0, .02)": small_normal,
        "linear N(0, .02), residual smaller": partial(small_normal, residual=True),
        "linear N(0, 1 over inputs)": fan_in,
        "no biases": bare,
        "no biases, RMSNorm": both(bare, rms_norm),
    }
    named = [
        Base(),
        Base("text without tests", whole=False),
        *(Base(name, changed(change)) for name, change in built.items()),
        Base("matrices alone decay", optimizer=matrices_decay),
        Base("warm-up of 100 steps", warmup=100),
    ]
    return {base.name: base for base in named}


def rows(lab: Lab) -> Iterator[tuple[Key, float]]:
    """Train and measure what the trial reports of its base."""
    for rate in RATES:
        student = lab.student(rate, 0)
        lab.train(student)
        yield ("full precision", rate, 32), lab.loss(student.model, "validation")
        for row, codes, rule in ROUNDINGS:
            for bits in WIDTHS:
                if (row, rate, bits) in TRIAL:
                    model = copy.deepcopy(student.model)
                    sw.ptq.rtn(model, replace(grid(lab, bits, codes), rule=rule), skip=lab.skip)
                    yield (row, rate, bits), lab.loss(model, "validation")
    for bits in WIDTHS:
        yield ("ste", RATES[0], bits), lab.loss(ours("sym", lambda q, lab: sw.ste(q))(lab, bits, RATES[0], 0).model, "validation")


def after(lab: Lab) -> Iterator[tuple[Key, float]]:
    """Train and measure the default and the best peer."""
    everyone = arms() | peers()
    for name, rate, bits in AFTER:
        yield (name, rate, bits), lab.loss(everyone[name].start(lab, bits, rate, 0).model, "validation")


def distance(entries: list[Entry]) -> float:
    """Return the root mean square of the logarithms of residual here over residual in the trial."""
    floors = {entry.rate: entry for entry in entries if entry.row == "full precision"}
    ratios = []
    for entry in entries:
        if entry.row != "full precision":
            floor = floors[entry.rate]
            ratios.append((entry.loss - floor.loss) / (entry.trial - floor.trial))
    return math.sqrt(sum(math.log(max(ratio, 1e-3)) ** 2 for ratio in ratios) / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="variants; else all")
    parser.add_argument("--table", action="store_true", help="run nothing, print")
    parser.add_argument("--after", action="store_true", help="the default and the best peer on some of the bases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("estimators_bases_after.csv" if options.after else "estimators_bases.csv")
    trial, measured, names = (AFTER, after, AFTER_BASES) if options.after else (TRIAL, rows, tuple(variants()))
    entries: list[Entry] = []
    if path.exists():
        with path.open(newline="") as file:
            entries = [Entry(*row[:2], float(row[2]), int(row[3]), float(row[4]), float(row[5])) for row in list(csv.reader(file))[1:]]
    for name in () if options.table else options.only or names:
        if any(entry.variant == name for entry in entries):
            continue
        entries += [Entry(name, *key, loss, trial[key]) for key, loss in measured(Lab(variants()[name]))]
        print(name, file=sys.stderr)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Entry._fields)
            writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in entry] for entry in entries)
    for name in dict.fromkeys(entry.variant for entry in entries):
        own = [entry for entry in entries if entry.variant == name]
        floors = {entry.rate: entry.loss for entry in own if entry.row == "full precision"}
        text = " ".join(f"{entry.loss - floors[entry.rate]:.4f}" for entry in own if entry.row != "full precision")
        print(f"{name:<40} {distance(own):.3f}  {' '.join(f'{floor:.4f}' for floor in floors.values())}  {text}")


if __name__ == "__main__":
    main()
