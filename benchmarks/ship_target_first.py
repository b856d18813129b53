"""What does a model lose at export, trained on the runtime's own grid or on another one of the same width?

    python benchmarks/ship_target_first.py [--seeds 2] [--seconds S] [--work FOLDER] [--out benchmarks/results/ship_target_first.json]

A byte language model (Llama's blocks, 1.4 million parameters, all Linear layers quantized, the head tied to the embedding) learns the
interpreter's own library in full precision, then trains on with the straight-through estimator on one grid, the same steps and the same
batches for all. What it learned is shipped to GGUF: as it is where the block type holds the grid, else rounded anew to the block type's
grid, which is what a converter does with the weights. "trained" is the held-out loss of the deployed weights, "shipped" that of the weights
which `gguf` decodes from the file, both in nats per byte; "codes changed" compares weights before and after export, in grid steps of the
target: how many moved by more than a hundredth of one. Rounding alone ("float") is what this export costs without any training on a grid.

Mean and standard error over seeds of data order and initial weights. Runs that are in the results are not made again, and the networks in
full precision stay in FOLDER, so that it can be stopped; delete both to begin anew.
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import processor
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import stepwell as sw
from stepwell.export import gguf_file, gguf_names
from stepwell.train.corpus import byte_batches, load_corpus, sequences
from stepwell.train.language import build
from stepwell.train.recipe import Architecture

ROOT = Path(__file__).parents[1]
ARCHITECTURE = Architecture("llama", width=256, layers=2, heads=4, hidden=512, vocabulary=256, tied=True)
LENGTH, ROWS, STEPS, TUNING, RATE = 64, 8, 500, 250, 2e-3
CASES = {  # trained on -> shipped to
    "gguf:q4_0": ("gguf:q4_0",),
    "int4 block 64": ("gguf:q4_0",),
    "int4 channel": ("gguf:q4_0",),
    "gguf:tq2_0": ("gguf:tq2_0",),
    "int2 block 64": ("gguf:tq2_0",),
    "float": ("gguf:q4_0", "gguf:tq2_0"),
}
GRIDS = {
    "gguf:q4_0": sw.target("gguf:q4_0"),
    "gguf:tq2_0": sw.target("gguf:tq2_0"),
    "int4 block 64": sw.int4(block=64),
    "int4 channel": sw.int4(block="channel"),
    "int2 block 64": sw.int2(block=64),
}


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of next bytes, in nats."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def held_out(model: nn.Module, tokens: Tensor) -> float:
    """Return the held-out loss."""
    model.eval()
    with torch.no_grad():
        return statistics.fmean(loss_of(model, part).item() for part in tokens.split(32))


def train(model: nn.Module, batches: Iterable[Tensor], steps: int, rate: float, grid: sw.Quantizer | None) -> dict[str, sw.Encoded]:
    """Train a model in place, on a grid or in full precision, the rate falling to zero; return what was encoded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    run = None if grid is None else sw.attach(model, sw.ste(grid), optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    model.train()
    for tokens in batches:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {} if run is None else run.finalize()


def ship(model: nn.Module, encoded: dict[str, sw.Encoded], target: str, tokens: Tensor) -> dict[str, float]:
    """Export to GGUF, decode the file, and return the loss of what is in it and how much the weights moved."""
    grid = sw.target(target)
    twin = copy.deepcopy(model)
    weights = dict(twin.named_parameters())
    before = {row.name: weights[row.name].detach().clone() for row in sw.select(twin).chosen}
    if not encoded or next(iter(encoded.values())).quantizer != grid:
        encoded = sw.ptq.rtn(twin, grid)
    with tempfile.TemporaryDirectory() as folder:
        path = sw.export.gguf(twin, encoded, Path(folder) / "m.gguf").path
        file = gguf_file.read(path)
        places = gguf_names.names(twin.config, list(weights))
        moved = total = 0
        with torch.no_grad():
            for name, parameter in weights.items():
                values = torch.from_numpy(gguf_file.values(file.tensors[places.files[name]]).copy())
                parameter.copy_(gguf_names.separate(values, places.heads[name]) if name in places.heads else values)
        for name, old in before.items():
            step = encoded[name].scales.abs().repeat_interleave(old.shape[1] // encoded[name].scales.shape[1], 1)
            moved += int(((weights[name].detach() - old).abs() > step / 100).sum())
            total += old.numel()
        return {"shipped": held_out(twin, tokens), "changed": moved / total}


def learned(seed: int, work: Path) -> nn.Module:
    """Return the network in full precision of one seed, trained where it is not there yet."""
    base, path = build(ARCHITECTURE, length=LENGTH, seed=seed), work / f"base_{seed}.safetensors"
    if path.is_file():
        load_model(base, path)
        return base
    text = load_corpus().train
    train(base, byte_batches(text, size=ROWS, length=LENGTH, steps=STEPS, seed=seed), STEPS, RATE, None)
    save_model(base, str(path))
    return base


def run(seed: int, name: str, work: Path) -> dict[str, dict[str, float]]:
    """Train on one grid and ship; return the losses for every target."""
    corpus = load_corpus()
    tokens = sequences(corpus.test, length=LENGTH, count=256)
    model = learned(seed, work)
    batches = byte_batches(corpus.train, size=ROWS, length=LENGTH, steps=TUNING, seed=1000 + seed)
    encoded = train(model, batches, TUNING, RATE / 4, GRIDS.get(name))
    trained = held_out(model, tokens)
    return {f"{name} -> {target}": {"trained": trained, **ship(model, encoded, target, tokens)} for target in CASES[name]}


def table(seeds: dict[str, Any]) -> str:
    """Return means over seeds, with standard errors of the loss at export."""
    lines = [f"{'trained on -> shipped to':<28} {'trained':>9} {'shipped':>9} {'lost at export':>18} {'weights changed':>16}"]
    for name, target in sorted(((case, target) for case in CASES for target in CASES[case]), key=lambda pair: pair[1]):
        rows = [found[f"{name} -> {target}"] for found in seeds.values() if f"{name} -> {target}" in found]
        if not rows:
            continue
        lost = [row["shipped"] - row["trained"] for row in rows]
        error = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else float("nan")
        means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        lines.append(
            f"{name + ' -> ' + target:<28} {means['trained']:>9.4f} {means['shipped']:>9.4f} {statistics.fmean(lost):>9.4f} +- {error:.4f}"
            f" {means['changed']:>15.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the seeds that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many, before the next run")
    parser.add_argument("--work", type=Path, default=Path("out/ship_target_first"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ship_target_first.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"seeds": {}}
    results |= {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "python": sys.version.split()[0]}
    started = time.perf_counter()
    for seed, name in product(range(options.seeds), CASES):
        found = results["seeds"].setdefault(str(seed), {})
        if all(f"{name} -> {target}" in found for target in CASES[name]) or time.perf_counter() - started > options.seconds:
            continue
        found |= run(seed, name, options.work)
        print(seed, name, found, flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["seeds"]))


if __name__ == "__main__":
    main()
