"""The comparison of `estimators.py` in small, on images: CIFAR-10 on a network with BatchNorm, and the digits, at 3 and 2 bits.

    STEPWELL_DATA=FOLDER python benchmarks/estimators_images.py [--only TASK] [--all] [--tables]

Protocol: `estimating/pictures.py`. The five methods were named before any of the reported seeds was run: straight-through training, LSQ on
all codes, torchao's PARQ (the best of the other libraries on the language model), LOTION, and the default; with them go full precision and
rounding. `--all` takes every method but GPTQ and those with a teacher. Three rates per method and width, tried on validation images with
the data of seed 0; reported are three other seeds on test images. CIFAR-10 is skipped, with a message, where STEPWELL_DATA does not name
it. Writes results/estimators_images.csv (runs; one that is there is not repeated), estimators_images_table.csv and the tables of
docs/methods.md.
"""

import argparse
import csv
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from estimating.lab import ROOT
from estimating.methods import FASTER_FLOAT, FLOAT, FLOAT_BITS, Arm, arms, inner
from estimating.peers import missing, peers
from estimating.pictures import TASKS, PictureLab
from estimating.runs import CHOOSING_SEED, RESULTS, SEEDS
from estimating.summary import DEFAULT, paired

NAMED = (FLOAT, "rtn, absmax", "rtn, searched scales", "ste", "lsq, all codes", "torchao parq", "lotion", DEFAULT)
WIDTHS = (3, 2)
ONLY_LANGUAGE = ("gptq, searched scales", "torchao qat", "brevitas, learned scales", "quanto")  # they need Linear layers, or tokens


class Shot(NamedTuple):
    """One run: nats per image and the share that is right, most levels of a channel, seconds of one core. `rtn` is the loss."""

    task: str
    method: str
    bits: int
    rate: float
    seed: int
    split: str
    rtn: float
    accuracy: float
    levels: int
    seconds: float


class Row(NamedTuple):
    """One method at one width: test part, means over seeds, intervals of the differences paired by seed."""

    task: str
    bits: int
    method: str
    kind: str
    codes: str
    rate: float
    accuracy: float
    loss: float
    residual: float
    residual_interval: float
    over_default: float
    over_default_interval: float
    seconds: float


def compared(everything: bool) -> dict[str, Arm]:
    """Return the arms that are run."""
    all_arms = arms() | peers()
    if not everything:
        return {name: all_arms[name] for name in NAMED}
    language = {name for name in all_arms if name.startswith(ONLY_LANGUAGE) or all_arms[name].teacher or "untuned" in name}
    return {name: arm for name, arm in all_arms.items() if name not in language | {FASTER_FLOAT}}


def chosen(shots: Sequence[Shot], task: str, name: str, bits: int, arm: Arm) -> float:
    """Return the rate with the least validation loss at a width, a diverged run counting as infinite."""
    if len(arm.rates) < 2:
        return arm.rates[0] if arm.rates else 0.0
    tried = {one.rate: one.rtn for one in shots if (one.task, one.method, one.split, one.bits) == (task, name, "validation", bits)}
    return min(arm.rates, key=lambda rate: math.inf if math.isnan(tried.get(rate, math.nan)) else tried[rate])


def fill(shots: list[Shot], lab: PictureLab, name: str, arm: Arm) -> Iterator[Shot]:
    """Make the runs of a method that are not there."""
    for bits in (FLOAT_BITS,) if name == FLOAT else WIDTHS:
        for rate in arm.rates if len(arm.rates) > 1 else ():
            yield from made(shots, lab, name, arm, (bits, rate, CHOOSING_SEED, "validation"))
        best = chosen(shots, lab.name, name, bits, arm)
        for seed in SEEDS:
            yield from made(shots, lab, name, arm, (bits, best, seed, "test"))


def made(shots: list[Shot], lab: PictureLab, name: str, arm: Arm, key: tuple[int, float, int, str]) -> Iterator[Shot]:
    """Train and measure one run, where it is not there."""
    if any(one[:6] == (lab.name, name, *key) for one in shots):
        return
    bits, rate, seed, split = key
    begin = time.process_time()
    model = arm.start(lab, bits, rate, seed).model  # type: ignore[arg-type]
    seconds = time.process_time() - begin
    levels = max(len(row.unique()) for layer in inner(model, ()).values() for row in layer.weight.detach().flatten(1))
    score = lab.score(model, split)
    shot = Shot(lab.name, name, *key, score.loss, score.accuracy, levels, seconds)
    shots.append(shot)
    yield shot


def summarise(shots: Sequence[Shot], everyone: Mapping[str, Arm]) -> list[Row]:
    """Return the rows of every method whose reported runs are all there, best first at each width."""
    rows = []
    for task in TASKS:
        reported = {
            (name, bits): [
                one for one in shots if one[:4] == (task, name, bits, chosen(shots, task, name, bits, arm)) and one.split == "test"
            ]
            for name, arm in everyone.items()
            for bits in (FLOAT_BITS, *WIDTHS)
        }
        control = reported[FLOAT, FLOAT_BITS]
        for (name, bits), runs in reported.items():
            if len(runs) < len(SEEDS) or len(control) < len(SEEDS):
                continue
            default = reported[DEFAULT, bits]
            over = paired(runs, default) if name not in (DEFAULT, FLOAT) and len(default) == len(SEEDS) else (math.nan, math.nan)
            found = everyone[name]
            means = (mean(one.accuracy for one in runs), mean(one.rtn for one in runs))
            seconds = mean(one.seconds for one in runs)
            rows.append(Row(task, bits, name, found.kind, found.grid, runs[0].rate, *means, *paired(runs, control), *over, seconds))
    return sorted(rows, key=lambda row: (list(TASKS).index(row.task), -row.bits, row.residual))


def document(rows: Sequence[Row], path: Path) -> None:
    """Write one table per task and width between the marks of a page."""
    parts = []
    for task, bits in dict.fromkeys((row.task, row.bits) for row in rows if row.bits != FLOAT_BITS):
        floor = next(row for row in rows if (row.task, row.bits) == (task, FLOAT_BITS))
        lines = [
            f"**{task}, INT{bits}** (full precision: {floor.accuracy:.1%} right, {floor.loss:.4f} nats)",
            "",
            "| method | codes | rate | right | nats above full precision | above the default |",
            "|---|---|---|---|---|---|",
        ]
        for row in (row for row in rows if (row.task, row.bits) == (task, bits)):
            name = {"ours": f"**{row.method}**", "peer": f"*{row.method}*"}.get(row.kind, row.method)
            over = "" if math.isnan(row.over_default) else f"{row.over_default:+.4f} ± {row.over_default_interval:.4f}"
            residual = f"{row.residual:.4f} ± {row.residual_interval:.4f}"
            lines.append(f"| {name} | {row.codes} | {f'{row.rate:.2g}' if row.rate else ''} | {row.accuracy:.1%} | {residual} | {over} |")
        parts.append("\n".join(lines))
    pattern = re.compile(r"(<!-- images[^>]*-->\n).*?(\n<!-- /images -->)", re.DOTALL)
    text = path.read_text()
    path.write_text(pattern.sub(lambda found: found[1] + "\n\n".join(parts) + found[2], text))


def written(path: Path, rows: Sequence[NamedTuple]) -> None:
    """Write records, named by their fields."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


def read(path: Path) -> list[Row]:
    """Return the rows of a written table."""
    kinds = Row.__annotations__
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks; else both")
    parser.add_argument("--all", action="store_true", help="every method, instead of the five")
    parser.add_argument("--tables", action="store_true", help="run nothing, summarise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, shots = RESULTS / "estimators_images.csv", []
    if path.exists():
        kinds = Shot.__annotations__
        with path.open(newline="") as file:
            shots = [Shot(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
    everyone = compared(options.all or options.tables)
    for task in () if options.tables else options.only:
        try:
            lab = PictureLab(task)
        except FileNotFoundError as error:
            print(f"skipped {task}: {error}", file=sys.stderr)
            continue
        for name, arm in everyone.items():
            if lack := missing(name):
                print(lack, file=sys.stderr)
                continue
            for shot in fill(shots, lab, name, arm):
                print(f"{task} {name:<22} {shot.bits:>2} bits  rate {shot.rate:.2g}  seed {shot.seed} {shot.rtn:.4f} {shot.accuracy:.1%}")
                written(path, shots)
    rows = summarise(shots, everyone)
    if rows:
        written(RESULTS / "estimators_images_table.csv", rows)
        document(read(RESULTS / "estimators_images_table.csv"), ROOT / "docs" / "methods.md")
    print(f"{len(shots)} runs, {sum(shot.seconds for shot in shots) / 3600:.2f} hours of one core")


if __name__ == "__main__":
    main()
