"""Language models in miniature on a CPU: LOTION, STE, both and the default against rounding, at 4, 3 and 2 bits.

    python benchmarks/lm_miniature.py [--minutes 9] [--work out/lm_miniature] [--tables]

Model and step are those of the recipes' size `1m`: 1.3 million parameters, 1.2 of them on the grid, batches of 16 x 64 tokens of the
interpreter's own sources, AdamW, a head that stays in float. A base per seed trains in full precision at a constant rate (500 steps). From
it every method goes on for 200 steps, 0.2 million tokens, the rate falling linearly to zero; full precision gets the same 200, and what it
ends on is rounded: to nearest, with searched scales, by GPTQ, by GPTQ with searched scales. One learning rate for all, settled before the
first run: half the base's, at which straight-through training does best when a byte model is cooled down in the same way; nothing is tuned
on what is reported. The default's quantized weights learn at twice the rate, so full precision and straight-through training are run at
twice the rate too. All grids are symmetric with blocks of 32 but the default's, which takes every code of its bits.

A run that results/lm_miniature.csv holds is not repeated, so that the script can be stopped and started; `--minutes` stops it between two
runs. Writes lm_miniature.csv (runs) and lm_miniature.json (paired differences with their intervals). About an hour of one core.
"""

import argparse
import csv
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from common import processor
from scipy.stats import t as student
from torch import nn

import stepwell as sw
from stepwell.recipes import lm
from stepwell.train.evaluation import Losses, evaluate
from stepwell.train.language import build, load_folder
from stepwell.train.ranks import here
from stepwell.train.recipe import Recipe
from stepwell.train.session import advance, begin
from stepwell.train.text import documents
from stepwell.train.tokenized import Wanted, prepare
from stepwell.train.tokens import Part, Tokens, open_tokens

RESULTS = Path(__file__).parent / "results"
BASE_STEPS, BASE_RATE, STEPS = 500, 3e-3, 200
RATE = 1.5e-3
SEEDS = (0, 1, 2)
BITS = (4, 3, 2)
TEST = 256  # held-out sequences
CALIBRATION = 32  # batches for GPTQ
TEXT = Wanted(6_000_000, 100_000)
TRAINED = {"ste": "_ste", "lotion": "_lotion", "ste + lotion": "_both", "default": "", "ste, twice the rate": "_ste"}
ROUNDED = ("rtn", "scale search", "gptq", "gptq, scale search")
FLOAT, FLOAT_BITS = "full precision", 32
TWICE = ", twice the rate"


class Row(NamedTuple):
    """One network: held-out losses in nats per token, of the latent weights, rounded to nearest, and at random (mean of 4 draws)."""

    method: str
    bits: int
    seed: int
    latent: float
    nearest: float
    randomized: float
    seconds: float

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from other runs."""
        return self.method, self.bits, self.seed


class Lab(NamedTuple):
    """Tokens, and the folder of the bases."""

    tokens: Tokens
    work: Path


def lab_of(work: Path) -> Lab:
    """Return the lab; its text is tokenized once."""
    vocabulary = lm.fp_1m().architecture.vocabulary
    prepare(lambda: shuffled(), work / "data", wanted=TEXT, vocabulary=vocabulary, source="the interpreter's own sources, in random order")
    return Lab(open_tokens(work / "data"), work)


def shuffled() -> Iterator[str | None]:
    """Return the interpreter's sources in an order of chance, so that the first millions of tokens are of all of them."""
    texts = list(documents(None))
    return iter(texts[k] for k in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist())


def base(lab: Lab, seed: int) -> Path:
    """Return the folder of a seed's base, trained where it is not there."""
    folder = lab.work / f"base-{seed}"
    if not folder.is_dir():
        recipe = replace(lm.fp_1m(), steps=BASE_STEPS, lr=BASE_RATE, warmup=20, floor=1.0, seed=seed)
        session = begin(recipe, build(recipe.architecture, length=recipe.length, seed=seed), lab.tokens, here("cpu"))
        for step in range(recipe.steps):
            advance(session, step)
        session.model.save_pretrained(aside := folder.with_suffix(".part"))  # type: ignore[operator]
        aside.rename(folder)
    return folder


def cooled(lab: Lab, name: str, seed: int, *, rate: float = RATE) -> tuple[nn.Module, sw.Run | None, Recipe]:
    """Return a base after its 200 steps under a method; `name` is that of a recipe."""
    recipe = replace(
        getattr(lm, name)(), steps=STEPS, lr=rate, warmup=0, decay="linear", seed=1000 + seed, evaluate_rows=TEST, draws=4
    )  # other batches than the base's
    session = begin(recipe, load_folder(base(lab, seed), length=recipe.length), lab.tokens, here("cpu"))
    for step in range(recipe.steps):
        advance(session, step)
    return session.model, session.run, recipe


def trained(lab: Lab, method: str, bits: int, seed: int) -> list[Row]:
    """Train one network and measure it."""
    began = time.perf_counter()
    model, run, recipe = cooled(lab, f"int{bits}_1m{TRAINED[method]}", seed, rate=2 * RATE if method.endswith(TWICE) else RATE)
    losses = evaluate(model, run, recipe, lab.tokens.held, here("cpu"), draws=recipe.draws)
    return [Row(method, bits, seed, *losses, time.perf_counter() - began)]


def float_at_twice(lab: Lab, seed: int) -> list[Row]:
    """Train one network in full precision at twice the rate."""
    began = time.perf_counter()
    model, _, recipe = cooled(lab, "fp_1m", seed, rate=2 * RATE)
    loss = evaluate(model, None, recipe, lab.tokens.held, here("cpu")).latent
    return [Row(FLOAT + TWICE, FLOAT_BITS, seed, loss, loss, loss, time.perf_counter() - began)]


def float_rows(lab: Lab, seed: int) -> list[Row]:
    """Train one network in full precision, and round it in every way."""
    began = time.perf_counter()
    model, _, recipe = cooled(lab, "fp_1m", seed)
    held = lab.tokens.held
    loss = evaluate(model, None, recipe, held, here("cpu")).latent
    rows = [Row(FLOAT, FLOAT_BITS, seed, loss, loss, loss, time.perf_counter() - began)]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    numbers = list(range(CALIBRATION * recipe.rows))
    calibration = list(lab.tokens.train.rows(numbers, recipe.length)[:, :-1].split(recipe.rows))
    for bits in BITS:
        for method in ROUNDED:
            began = time.perf_counter()
            grid = getattr(sw, f"int{bits}")()
            grid = replace(grid, rule="mse") if "search" in method else grid
            losses = rounded(model, grid, calibration if "gptq" in method else None, replace(recipe, quantizer=grid), held)
            model.load_state_dict(weights)
            rows.append(Row(method, bits, seed, *losses, time.perf_counter() - began))
    return rows


def rounded(model: nn.Module, grid: sw.Quantizer, calibration: list[torch.Tensor] | None, recipe: Recipe, held: Part) -> Losses:
    """Return the losses of a network rounded by RTN, or by GPTQ: its weights lie on the grid, and random rounding leaves them there."""
    if calibration is None:
        return evaluate(model, None, recipe, held, here("cpu"), draws=recipe.draws)
    forward: Callable[[nn.Module, torch.Tensor], object] = lambda model, batch: model(input_ids=batch)  # noqa: E731
    sw.ptq.gptq(model, grid, calibration, skip=recipe.skip, forward=forward)
    loss = evaluate(model, None, recipe, held, here("cpu")).latent
    return Losses(loss, loss, loss)


def read(path: Path) -> list[Row]:
    """Return the runs that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Row(one["method"], int(one["bits"]), int(one["seed"]), *(float(one[key]) for key in Row._fields[3:])) for one in lines]


def append(path: Path, rows: list[Row]) -> None:
    """Add runs to the file, all of them at once."""
    there = path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not there:
            writer.writerow(Row._fields)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


def next_task(rows: list[Row], lab: Lab) -> Callable[[], list[Row]] | None:
    """Return the next that is to be run, seed by seed; None where all is there."""
    there = {row.key for row in rows}
    for seed in SEEDS:
        if (FLOAT, FLOAT_BITS, seed) not in there:
            return partial(float_rows, lab, seed)
        if (FLOAT + TWICE, FLOAT_BITS, seed) not in there:
            return partial(float_at_twice, lab, seed)
        for bits in BITS:
            for method in TRAINED:
                if (method, bits, seed) not in there:
                    return partial(trained, lab, method, bits, seed)
    return None


def interval(differences: list[float]) -> dict[str, object]:
    """Return a mean and half the length of its 95 % interval, by Student's t over seeds."""
    half = math.inf if len(differences) < 2 else student.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return {"mean": round(mean(differences), 4), "half_width": round(half, 4), "seeds": len(differences)}


def summarise(rows: list[Row], lab: Lab) -> dict[str, object]:
    """Return means over seeds, and differences paired by seed, of what was run on test text."""
    at = {row.key: row for row in rows}
    means, differences = [], []
    for bits in BITS:
        for method in (*ROUNDED, *TRAINED):
            found = [at[method, bits, seed] for seed in SEEDS if (method, bits, seed) in at]
            if found:
                means.append({"bits": bits, "method": method, **{k: round(mean(getattr(r, k) for r in found), 4) for k in Losses._fields}})
        for method, other in [
            (m, o) for m in ("lotion", "ste + lotion", "default") for o in ("ste", f"ste{TWICE}", "gptq, scale search", "scale search")
        ]:
            seeds = [seed for seed in SEEDS if (method, bits, seed) in at and (other, bits, seed) in at]
            for measure in ("nearest", "randomized") if seeds else ():
                each = [getattr(at[method, bits, s], measure) - getattr(at[other, bits, s], measure) for s in seeds]
                differences.append({"bits": bits, "method": method, "less": other, "measure": measure, **interval(each)})
    floats, twice = ([row.latent for row in rows if row.method == name] for name in (FLOAT, FLOAT + TWICE))
    return {
        "unit": "nats per token on held-out text",
        "full_precision": round(mean(floats), 4) if floats else None,
        "full_precision_at_twice_the_rate": round(mean(twice), 4) if twice else None,
        "rate": RATE,
        "means": means,
        "differences": differences,
        "tokens": lab.tokens.facts["parts"],
        "machine": {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that many")
    parser.add_argument("--work", type=Path, default=Path("out/lm_miniature"), help="folder for tokens and bases")
    parser.add_argument("--tables", action="store_true", help="run nothing, summarise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, began = RESULTS / "lm_miniature.csv", time.perf_counter()
    lab = lab_of(options.work)
    while not options.tables and time.perf_counter() - began < 60 * options.minutes:
        task = next_task(read(path), lab)
        if task is None:
            break
        rows = task()
        append(path, rows)
        for row in rows:
            print(*row, file=sys.stderr, flush=True)
    summary = summarise(read(path), lab)
    (RESULTS / "lm_miniature.json").write_text(json.dumps(summary, indent=1) + "\n")
    for line in summary["means"]:
        print(
            f"{line['bits']} bits  {line['method']:<20} float {line['latent']:.4f}  RTN {line['nearest']:.4f}  RR {line['randomized']:.4f}"
        )
    for line in summary["differences"]:
        shown = f"{line['mean']:+.4f} ± {line['half_width']:.4f}"
        print(f"{line['bits']} bits  {line['method']:<14} less {line['less']:<20} {line['measure']:<10} {shown}")


if __name__ == "__main__":
    main()
