"""Which method trains the best network at 4, 3 and 2 bits? One model, one budget, the same data for everyone.

    python benchmarks/estimators.py [--only METHOD] [--bits 4.5 4 3 2] [--sweep] [--wide] [--tables] [--base NAME]

Protocol: `estimating/lab.py` says what is trained, `estimating/methods.py` and `peers.py` how. Every method gets three learning rates at
every width, tried on the validation part of the corpus with the data of seed 0, and is reported on the test part with three other seeds:
the best rate's losses, less those of full precision with the same data (its own best of the same three rates). Methods with a teacher are
held against full precision with the same teacher, which is the full-precision run of the same seed. A run that results/estimators.csv
holds is not repeated. Writes estimators.csv (runs), estimators_table.csv, estimators.svg and the tables of
docs/methods.md; `--tables` runs nothing. `--sweep` takes a method over a fourfold range of rates (test part, one seed) into
estimators_rates.csv; `--wide` measures its reported runs on 4096 test sequences instead of 512 (estimators_wide.csv).

`--base` is the same comparison on another of the bases in `estimating/bases.py`: its runs, table and figure go to files of their own,
estimators_NAME.csv and so on, made up of the letters and digits of its name; what is written of the main base, the page included, stays
as it is.

Needs `pip install "stepwell[bench]"`; Brevitas, whose pins contradict ours, by `pip install --no-deps brevitas dependencies==2.0.1
unfoldNd`, quanto by `pip install --no-deps optimum-quanto optimum`. About an hour and a quarter of one core.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from estimating.bases import variants
from estimating.lab import OURS, ROOT, Lab
from estimating.methods import ALL, FLOAT_BITS, Arm, arms
from estimating.peers import missing, peers
from estimating.runs import RESULTS, SEEDS, Run, Table, fill, made
from estimating.summary import document, figure, read, summarise, write

SWEPT = (0.75e-3, 1.5e-3, 3e-3)
PEERS_AFTER = "default"  # the row that peers follow, so that the most important come first


def ordered() -> dict[str, Arm]:
    """Return all arms, those of other libraries after the default."""
    own, others = arms(), peers()
    names = list(own)
    place = names.index(PEERS_AFTER) + 1
    return {name: (own | others)[name] for name in [*names[:place], *others, *names[place:]]}


def file(lab: Lab, end: str) -> Path:
    """Return where something about a base is written, by how the file's name ends."""
    own = "" if lab.kind.name == OURS.name else "_" + "_".join(re.findall(r"[a-z0-9]+", lab.kind.name.lower()))
    return RESULTS / f"estimators{own}{end}"


def sweep(lab: Lab, name: str, arm: Arm, bits: float) -> Iterator[Run]:
    """Make a method's runs over a fourfold range of learning rates."""
    table = Table(file(lab, "_rates.csv"))
    there = {run.key for run in table.runs}
    for rate in SWEPT:
        key = (name, bits, rate, SEEDS[0], "test")
        if key not in there:
            yield made(table, lab, key, arm)


def measured_wide(lab: Lab, name: str, arm: Arm, bits: float, rate: float) -> Iterator[Run]:
    """Make a method's reported runs again, and measure them on eight times as many sequences of the test part."""
    table = Table(file(lab, "_wide.csv"))
    there = {run.key for run in table.runs}
    for seed in SEEDS:
        if (name, bits, rate, seed, "wide") not in there:
            yield made(table, lab, (name, bits, rate, seed, "wide"), arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="methods; else all")
    parser.add_argument("--bits", nargs="+", type=float, choices=ALL, default=list(ALL), help="widths; 4.5 is NVFP4")
    parser.add_argument("--tables", action="store_true", help="run nothing, summarise")
    parser.add_argument("--sweep", action="store_true", help="over learning rates, instead of the comparison")
    parser.add_argument("--wide", action="store_true", help="on eight times as many test sequences, instead of the comparison")
    parser.add_argument("--base", choices=tuple(variants()), default=OURS.name, metavar="NAME", help="another of estimating/bases.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lab = Lab(variants()[options.base])
    everyone, table = ordered(), Table(file(lab, ".csv"))
    unknown = sorted(set(options.only or ()) - set(everyone))
    if unknown:
        parser.error(f"--only must name methods: got {unknown}. There are: {', '.join(everyone)}")
    for name in () if options.tables else options.only or everyone:
        if lack := missing(name):
            print(lack, file=sys.stderr)
            continue
        for bits in everyone[name].widths:
            if bits not in (FLOAT_BITS, *options.bits):
                continue
            runs = fill(table, lab, name, everyone[name], bits)
            if options.sweep:
                runs = sweep(lab, name, everyone[name], bits)
            elif options.wide:
                runs = measured_wide(lab, name, everyone[name], bits, table.chosen(name, bits, everyone[name]))
            for run in runs:
                print(f"{name:<26} {bits:>3} bits  rate {run.rate:.2g}  seed {run.seed} {run.split:<10} {run.rtn:.4f}", file=sys.stderr)
    if options.sweep or options.wide:
        return
    write(summarise(table, everyone), file(lab, "_table.csv"))
    rows = read(file(lab, "_table.csv"))  # what the page says is what the file says, to the last digit
    figure(rows, file(lab, ".svg"))
    if lab.kind.name == OURS.name:
        document(rows, ROOT / "docs" / "methods.md")
    hours = sum(run.seconds for run in table.runs) / 3600
    print(f"{len(table.runs)} runs, {hours:.2f} hours of one core")


if __name__ == "__main__":
    main()
