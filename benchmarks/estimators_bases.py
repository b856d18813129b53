"""Is the base of `estimators.py` as hard to quantize as the one that our goals were measured on? Reference rows of other bases beside it.

    python benchmarks/estimators_bases.py [--only VARIANT] [--draw N] [--table] [--check] [--after]

The goals (nats above full precision at 4, 3 and 2 bits) come from a trial whose protocol leaves details of the base open: initial weights,
biases, norm, weight decay, text. Every variant of `estimating/bases.py` changes such details; its rows are full precision at two rates,
rounding by absolute maximum and at searched scales, and plain straight-through training, seed 0, validation part. Compared are residuals,
since the texts differ. `distance` is the root mean square over twelve rows of log(residual here / residual in the trial); the default
recipe is not run here, so that a base cannot be chosen for it. Results: results/estimators_bases.csv. A minute of one core per variant.

`--draw 1` takes other initial weights and other batches, for the noise of a distance; whoever picks the least of many distances picks
noise as well. `--check` measures what did not choose: 27 further rows of the trial (GPTQ, other codes, torchao's PARQ), none of
them of a method of ours, into results/estimators_bases_check.csv, on the bases named by `--only`.

`--after`, once the base is chosen: the default and torchao's PARQ on some of the bases, at the rate that both have in the comparison, into
results/estimators_bases_after.csv: how much of a residual is the base's.
"""

import argparse
import copy
import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from estimating.bases import variants
from estimating.lab import Base, Lab, Student
from estimating.methods import CALIBRATION, CALIBRATION_SEED, arms, grid, ours
from estimating.peers import peers, torchao_parq
from estimating.runs import RESULTS

import stepwell as sw

RATES = (1.5e-3, 3e-3)
WIDTHS = (4, 3, 2)
ROUNDINGS: tuple[tuple[str, str, Literal["absmax", "mse"]], ...] = (
    ("rtn, absmax", "sym", "absmax"),
    ("rtn, searched, sym", "sym", "mse"),
    ("rtn, searched, full", "full", "mse"),
)
TRIAL = {  # loss in the trial by row and width; the first two are full precision
    ("full precision", 1.5e-3, 32): 1.6281,
    ("full precision", 3e-3, 32): 1.6317,
    **{("rtn, absmax", 3e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6513, 1.7708, 3.1531), strict=True)},
    **{("rtn, searched, sym", 1.5e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6504, 1.7326, 2.3649), strict=True)},
    **{("rtn, searched, full", 1.5e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6434, 1.6963, 2.0174), strict=True)},
    **{("ste", 1.5e-3, bits): loss for bits, loss in zip(WIDTHS, (1.6352, 1.6566, 1.8173), strict=True)},
}
CHECK = {  # loss in the trial of rows that do not enter the distance, all at the lower rate
    ("full precision", RATES[0], 32): 1.6281,
    **{
        (row, RATES[0], bits): loss
        for row, losses in {
            "rtn, absmax, full": (1.6482, 1.7071, 2.0183),
            "rtn, absmax, mid": (1.6485, 1.7174, 2.3139),
            "rtn, searched, mid": (1.6463, 1.7093, 2.1231),
            "gptq, sym": (1.6364, 1.7140, 2.2240),
            "gptq, full": (1.6331, 1.6825, 1.9365),
            "gptq, mid": (1.6356, 1.6878, 2.0716),
            "ste, full": (1.6348, 1.6454, 1.6949),
            "ste, mid": (1.6336, 1.6472, 1.7267),
            "torchao parq": (1.6331, 1.6424, 1.6739),
        }.items()
        for bits, loss in zip(WIDTHS, losses, strict=True)
    },
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


def rows(lab: Lab) -> Iterator[tuple[Key, float]]:
    """Train and measure what the trial reports of its base."""
    for rate in RATES:
        student = cooled(lab, rate)
        yield ("full precision", rate, 32), lab.loss(student.model, "validation")
        for row, codes, rule in ROUNDINGS:
            for bits in WIDTHS:
                if (row, rate, bits) in TRIAL:
                    yield (row, rate, bits), rounded(lab, student, bits, codes, rule)
    for bits in WIDTHS:
        yield ("ste", RATES[0], bits), straight_through(lab, bits, "sym")


def check(lab: Lab) -> Iterator[tuple[Key, float]]:
    """Train and measure what else the trial reports that owes nothing to our methods."""
    rate = RATES[0]
    student = cooled(lab, rate)
    yield ("full precision", rate, 32), lab.loss(student.model, "validation")
    for bits in WIDTHS:
        for codes in ("full", "mid"):
            yield (f"rtn, absmax, {codes}", rate, bits), rounded(lab, student, bits, codes, "absmax")
        yield ("rtn, searched, mid", rate, bits), rounded(lab, student, bits, "mid", "mse")
        for codes in ("sym", "full", "mid"):
            yield (f"gptq, {codes}", rate, bits), calibrated(lab, student, bits, codes)
        for codes in ("full", "mid"):
            yield (f"ste, {codes}", rate, bits), straight_through(lab, bits, codes)
        yield ("torchao parq", rate, bits), lab.loss(torchao_parq(lab, bits, rate, lab.kind.seed).model, "validation")


def cooled(lab: Lab, rate: float) -> Student:
    """Return the full-precision run."""
    student = lab.student(rate, lab.kind.seed)
    lab.train(student)
    return student


def rounded(lab: Lab, student: Student, bits: int, codes: str, rule: Literal["absmax", "mse"]) -> float:
    """Return the loss after rounding to nearest."""
    model = copy.deepcopy(student.model)
    sw.ptq.rtn(model, replace(grid(lab, bits, codes), rule=rule), skip=lab.skip)
    return lab.loss(model, "validation")


def calibrated(lab: Lab, student: Student, bits: int, codes: str) -> float:
    """Return the loss after GPTQ at searched scales."""
    model = copy.deepcopy(student.model)
    batches = [(batch[:, :-1],) for batch in lab.batches(CALIBRATION, CALIBRATION_SEED)]
    sw.ptq.gptq(model, replace(grid(lab, bits, codes), rule="mse"), batches, skip=lab.skip)
    return lab.loss(model, "validation")


def straight_through(lab: Lab, bits: int, codes: str) -> float:
    """Return the loss after plain straight-through training at absmax scales."""
    start = ours(codes, lambda q, lab: sw.ste(q))
    return lab.loss(start(lab, bits, RATES[0], lab.kind.seed).model, "validation")


def after(lab: Lab) -> Iterator[tuple[Key, float]]:
    """Train and measure the default and the best peer."""
    everyone = arms() | peers()
    for name, rate, bits in AFTER:
        yield (name, rate, bits), lab.loss(everyone[name].start(lab, bits, rate, lab.kind.seed).model, "validation")


def distance(entries: list[Entry]) -> float:
    """Return the root mean square of the logarithms of residual here over residual in the trial."""
    floors = {entry.rate: entry for entry in entries if entry.row == "full precision"}
    ratios = []
    for entry in entries:
        if entry.row != "full precision":
            floor = floors[entry.rate]
            ratios.append((entry.loss - floor.loss) / (entry.trial - floor.trial))
    return math.sqrt(sum(math.log(max(ratio, 1e-3)) ** 2 for ratio in ratios) / len(ratios))


def read(path: Path) -> list[Entry]:
    """Return the losses of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Entry(*row[:2], float(row[2]), int(row[3]), float(row[4]), float(row[5])) for row in list(csv.reader(file))[1:]]


def write(entries: list[Entry], path: Path) -> None:
    """Write all losses."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Entry._fields)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in entry] for entry in entries)


def show(entries: list[Entry]) -> None:
    """Print the bases, the nearest first: distance, floors, residuals; the trial's own above them."""
    found = {name: [entry for entry in entries if entry.variant == name] for name in dict.fromkeys(entry.variant for entry in entries)}
    if not found:
        return
    first = next(iter(found.values()))
    known = {"the trial": [entry._replace(loss=entry.trial) for entry in first]}
    for name, own in (known | dict(sorted(found.items(), key=lambda item: distance(item[1])))).items():
        floors = {entry.rate: entry.loss for entry in own if entry.row == "full precision"}
        text = " ".join(f"{entry.loss - floors[entry.rate]:.4f}" for entry in own if entry.row != "full precision")
        print(f"{distance(own):.3f}  {' '.join(f'{floor:.4f}' for floor in floors.values())}  {text}  {name}")


def drawn(base: Base, draw: int) -> Base:
    """Return a base of other initial weights and batches; draw 0 is the base itself."""
    return base._replace(name=f"{base.name}, draw {draw}", seed=draw) if draw else base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="variants; else all")
    parser.add_argument("--draw", type=int, default=0, help="other initial weights and batches")
    parser.add_argument("--table", action="store_true", help="run nothing, print")
    parser.add_argument("--check", action="store_true", help="rows of the trial that do not enter the distance, on the bases of --only")
    parser.add_argument("--after", action="store_true", help="the default and the best peer on some of the bases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {
        "": (TRIAL, rows, tuple(variants())),
        "_check": (CHECK, check, ()),
        "_after": (AFTER, after, AFTER_BASES),
    }
    which = "_check" if options.check else "_after" if options.after else ""
    trial, measured, names = kinds[which]
    unknown = sorted(set(options.only or ()) - set(variants()))
    if unknown:
        parser.error(f"--only must name variants: got {unknown}. There are: {'; '.join(variants())}")
    path = RESULTS / f"estimators_bases{which}.csv"
    entries = read(path)
    for name in () if options.table else options.only or names:
        base = drawn(variants()[name], options.draw)
        if any(entry.variant == base.name for entry in entries):
            continue
        entries += [Entry(base.name, *key, loss, trial[key]) for key, loss in measured(Lab(base))]
        print(base.name, file=sys.stderr)
        write(entries, path)
    show(entries)


if __name__ == "__main__":
    main()
