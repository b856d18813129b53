"""The campaign: every network of `subjects.py` on every grid, rounded, calibrated, trained and probed; fills the tables of results/.

    python papers/basin/runs.py [--only NETWORK]

A configuration whose rows are in results/runs.csv is not run again, so that a stopped campaign goes on where it was. Writes runs.csv (one
row per network, scheme, bits and learning rate), and by network, scheme and bits: probes.csv (D2, D3), profiles.csv (D1), inward.csv (D4),
neighbours.csv (D5), latents.csv (D7), controls.csv (D8), lotion.csv; networks.csv describes the float networks. The committed rows took 47
minutes of one core (digits 4, language models 17, CIFAR-10 27), shared with other work. The networks on CIFAR-10 are left out, with a
message, where STEPWELL_DATA does not name the folder that contains cifar10/. One process at a time may write the tables.

Left out to save time: other learning rates than 1e-3 at 8 bits; D5 at 8 bits; for the language models and those on CIFAR-10 also D1,
D5 and LOTION at 8 and 4 bits, the search over flips beyond 12 rounds, a third draw of rho_uniform; scales per block of 64, which for the
language model are those per channel in nine of twelve matrices.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measures import (
    MIDDLE_RATE,
    TOLERANCE,
    Base,
    Floated,
    base,
    calibrated,
    control,
    final,
    grid_of,
    latents,
    lotion,
    near,
    profiles,
    qat,
    ratios,
    searched,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from subjects import NAMES, Subject, subject
from tables import Row, has, replace
from training import train

import stepwell as sw
from stepwell.probes.width import Width

SCHEMES: dict[str, Callable[[int], sw.Quantizer]] = {
    "tensor-mse": lambda bits: sw.intn(bits, block=None, scale="mse"),
    "channel-mse": lambda bits: sw.intn(bits, block="channel", scale="mse"),
    "tensor-absmax": lambda bits: sw.intn(bits, block=None),
}
BITS, STEPS = (8, 4, 3, 2), 240
RATES = (3e-4, 1e-3, 4e-3)
WIDTHS = 8  # random directions for rho_fn, once per network: those of narrow deep networks differ by a factor of three
COARSE = 3  # bits of the direction of rho_cross
LARGE = 20_000  # weights, from which less is measured
ROUNDS, FEWER_ROUNDS = 40, 12  # of the search over flips
DRAWS, FEWER_DRAWS = 3, 2  # of uniform noise for rho_uniform


class Network:
    """What all grids of one network share, made when the first of them needs it."""

    def __init__(self, name: str) -> None:
        self.subject: Subject = subject(name)
        self.model = self.subject.model()
        self.data: list[Any] = self.subject.later(STEPS)
        self.some = some = grid_of(self.subject, self.model, sw.int4(block=None))
        self.names, self.weights = list(some.centre), sum(one.codes.numel() for one in some.centre.values())
        self.start: Base = base(some)
        found = sw.probes.rho_fn(self.model, self.subject.on("validation"), toward=some.centre, tolerance=TOLERANCE, draws=WIDTHS)
        self.widths: tuple[Width, ...] = found.widths
        self._floats: dict[float, Floated] = {}
        self._coarse: dict[str, Width] = {}

    @property
    def large(self) -> bool:
        """Whether time forbids measuring everything on every grid."""
        return self.weights > LARGE

    def floats(self, rate: float) -> Floated:
        """Return the weights after float training with the budget of QAT; the same for every grid."""
        if rate not in self._floats:
            weights = train(self.subject, self.model, self.names, None, self.data, rate=rate)
            self._floats[rate] = Floated(weights, final(self.some, weights, self.start))
        return self._floats[rate]

    def coarse(self, scheme: str) -> Width:
        """Return the width of the way to the weights rounded to 3 bits, which serves all bits of a scheme."""
        if scheme not in self._coarse:
            target = grid_of(self.subject, self.model, SCHEMES[scheme](COARSE)).centre
            self._coarse[scheme] = sw.probes.width(self.model, self.subject.on("validation"), toward=target, tolerance=TOLERANCE)
        return self._coarse[scheme]

    def described(self) -> Row:
        """Return the row of networks.csv."""
        row: Row = {"network": self.subject.name, "seed": self.subject.seed, "weights": self.weights, "data": self.subject.data}
        for part in ("calibration", "validation", "test"):
            row[f"{part}_loss"] = float(self.subject.each(self.model, part).mean())
            row[f"{part}_accuracy"] = self.subject.accuracy(self.model, part)
        return row | {"width_fn": sum(width.value for width in self.widths) / len(self.widths)}


def rates(bits: int) -> tuple[float, ...]:
    """Return the learning rates that are tried: at 8 bits there is nothing to win."""
    return (MIDDLE_RATE,) if bits == max(BITS) else RATES


def configuration(network: Network, scheme: str, bits: int) -> dict[str, list[Row]]:
    """Measure one network on one grid; return table -> rows without their key."""
    grid = grid_of(network.subject, network.model, SCHEMES[scheme](bits))
    start, data = network.start, network.data
    points = {"rtn": grid.centre, "search": searched(grid), "gptq": calibrated(grid)}
    rounded = {name: final(grid, weights, start) for name, weights in points.items()}
    probes = ratios(grid, network.widths, network.coarse(scheme), points, draws=FEWER_DRAWS if network.large else DRAWS)
    shared: Row = {
        "weights": network.weights,
        "loss": float(start.validation.mean()),
        "heldout": float(start.test.mean()),
        "rtn": rounded["rtn"].value,
        "rtn_se": rounded["rtn"].error,
        "rtn_heldout": rounded["rtn"].held_out,
        "search": rounded["search"].value,
        "search_heldout": rounded["search"].held_out,
        "gptq": rounded["gptq"].value,
        "gptq_se": rounded["gptq"].error,
        "gptq_heldout": rounded["gptq"].held_out,
        **{name: probes[name] for name in ("rho_fn", "rho_uniform", "rho_self", "quadratic")},
    }
    tables: dict[str, list[Row]] = {"runs.csv": [], "controls.csv": [], "probes.csv": [probes]}
    for rate in rates(bits):
        trained = qat(grid, start, data, rate)
        floated = control(grid, start, network.floats(rate), rate, STEPS)
        tables["controls.csv"].append(floated)
        tables["runs.csv"].append(shared | trained.row | {name: floated[name] for name in ("control", "control_heldout")})
        if rate == MIDDLE_RATE:
            tables["inward.csv"], tables["latents.csv"] = trained.inward, [latents(grid, trained)]
            if bits <= 3 or not network.large:
                lines = {name: points[name] for name in ("rtn", "gptq")} | {"qat": trained.found}
                tables["profiles.csv"] = profiles(grid, lines, trained.found)
                tables["lotion.csv"] = lotion(grid, start, data, trained.row)
    if bits <= (3 if network.large else 4):
        tables["neighbours.csv"] = near(grid, start, data, rounds=FEWER_ROUNDS if network.large else ROUNDS)
    return tables


def save(network: Network, scheme: str, bits: int, tables: dict[str, list[Row]]) -> None:
    """Write the rows of a configuration; runs.csv last, because it says that the others are there."""
    one = network.subject
    for name in [*(name for name in tables if name != "runs.csv"), "runs.csv"]:
        key: Row = {"network": one.name, "scheme": scheme, "bits": bits}
        if name == "runs.csv":
            key = {"network": one.name, "architecture": one.architecture, "seed": one.seed, "scheme": scheme, "bits": bits}
        replace(name, (one.name, scheme, bits), [key | row for row in tables[name]], NAMES)


def waiting(name: str) -> list[tuple[str, int]]:
    """Return the grids of a network whose rows are not all there."""
    return [(scheme, bits) for scheme in SCHEMES for bits in BITS if len(has("runs.csv", (name, scheme, bits))) < len(rates(bits))]


def run(name: str, progress: Progress) -> None:
    """Run what is missing of one network."""
    grids = waiting(name)
    if not grids:
        return
    begin, task = time.process_time(), progress.add_task(f"{name}: float network", total=len(grids))
    try:
        network = Network(name)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        progress.console.print(f"{name} is left out: {error}")
        return
    replace("networks.csv", (name,), [network.described()], NAMES)
    for scheme, bits in grids:
        progress.update(task, description=f"{name}: {scheme}, {bits} bits")
        save(network, scheme, bits, configuration(network, scheme, bits))
        progress.update(task, advance=1)
    progress.console.print(f"{name}: {len(grids)} configurations in {time.process_time() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NAMES, help="one network instead of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        for name in [options.only] if options.only else NAMES:
            run(name, progress)


if __name__ == "__main__":
    main()
