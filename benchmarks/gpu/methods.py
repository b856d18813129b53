"""What is each method worth at 150 million weights? One full-precision run, then every method from its weights at equal tokens, one table.

    python benchmarks/gpu/methods.py [--bits 4,3,2] [--minutes 9] [--lr 5e-4] [--seed 0] [--toy] [--out benchmarks/results/gpu_methods.json]

A Llama-like decoder over bytes, 21 layers of width 768: 149 million weights in its blocks. Text: the sources of the interpreter's library
and of all installed packages, one file in twenty held out. Half of the time goes to the full-precision run; the other half is shared by
its continuation (which rounding starts from: nearest, searched scales, GPTQ) and by STE, LOTION and STE + LOTION at every width, each from
the same weights, on the same batches, at one learning rate that nobody was tuned for, falling to zero. Steps follow from measured speed:
of a step, and of all else that one width takes, which is rehearsed once: rounding, GPTQ, evaluation, and compiling every method's passes.

Losses are nats per byte on the same held-out sequences for all. The interval of a difference is 1.96 standard errors of its mean over
sequences, paired: it says nothing about another seed. Run it with other seeds, or one width at a time, for more steps each.
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import processor
from common.language import SKIP, method_of

import stepwell as sw
from stepwell.ptq.gptq import gptq
from stepwell.schedules import cosine, linear
from stepwell.train.corpus import python_sources
from stepwell.train.language import build, row_losses
from stepwell.train.recipe import Architecture

Batch, Rate = Callable[[int], Tensor], Callable[[int], float]  # of a step: rows of tokens; learning rate

METHODS = ("ste", "lotion", "ste + lotion")
EVERY, PROBE, RESERVE = 20, 10, 0.85  # one file in so many is held out; steps that are timed; share of what is left that steps may use
CALIBRATION = 8  # batches that GPTQ sees


class Scale(NamedTuple):
    """How large everything is.

    Attributes:
        architecture: of the model.
        rows, length: of a step.
        held: held-out sequences.
        block: of the grid.
        files: how many files of text are read; None is all.
        steps: full-precision steps, and steps of every method; None follows from the time.
    """

    architecture: Architecture
    rows: int
    length: int
    held: int
    block: int
    files: int | None
    steps: tuple[int, int] | None


FULL = Scale(Architecture("llama", 768, 21, 12, 2048, 256, False), 32, 1024, 256, 32, None, None)
TOY = Scale(Architecture("llama", 32, 2, 2, 64, 256, False), 4, 32, 16, 32, 60, (60, 20))


class Stage(NamedTuple):
    """Where everything happens: the model, as it is and compiled, the text, and the scale."""

    model: nn.Module
    forward: Any
    train: Tensor
    held: Tensor
    scale: Scale
    device: torch.device

    @property
    def precision(self) -> Any:
        """What logits are computed in."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    def calibrating(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Run the model for GPTQ, which calls it once per batch and layer: in float32 a GPU would take minutes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            model(**batch)


def text(scale: Scale) -> tuple[Tensor, Tensor]:
    """Return the bytes for training, `(bytes,)`, and held-out sequences `(held, length + 1)`."""
    paths = sysconfig.get_paths()
    found = python_sources(Path(paths["stdlib"]), whole=True)
    if scale.files is None:
        found += python_sources(Path(paths["purelib"]), whole=True)
    found = found[: scale.files]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(found):
        parts[number % EVERY == 0].append(path.read_bytes())
    train, held = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    stride = (len(held) - 1) // scale.held
    if stride < scale.length:
        raise SystemExit(f"only {len(held):,} held-out bytes were found: too few for {scale.held} sequences of {scale.length}")
    return train, torch.stack([held[k * stride : k * stride + scale.length + 1] for k in range(scale.held)]).long()


def batches(stage: Stage, *, seed: int) -> Batch:
    """Return what gives the rows of a step: a function of seed and step alone."""
    offsets = torch.arange(stage.scale.length + 1, device=stage.device)

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(stage.train) - stage.scale.length - 1, (stage.scale.rows, 1), generator=generator)
        return stage.train[starts.to(stage.device) + offsets].long()

    return batch


def train(stage: Stage, optimizer: torch.optim.Optimizer, rate: Rate, steps: int, batch: Batch) -> None:
    """Take some steps."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        tokens = batch(step)
        optimizer.zero_grad(set_to_none=True)
        (row_losses(stage.forward, tokens, stage.precision).sum() / (stage.scale.rows * stage.scale.length)).backward()
        nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()


def adamw(stage: Stage, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(stage.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


@torch.no_grad()
def losses(stage: Stage) -> Tensor:
    """Return the loss of every held-out sequence, in nats per byte."""
    parts = [row_losses(stage.forward, rows.to(stage.device), stage.precision).cpu() for rows in stage.held.split(stage.scale.rows)]
    return torch.cat(parts).double() / stage.scale.length


def rounded(stage: Stage, bits: int, weights: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return the losses of rounding without training."""
    found, q = {}, sw.intn(bits, block=stage.scale.block)
    searched = sw.intn(bits, block=stage.scale.block, scale="mse")
    for name, rule in (
        ("rtn", lambda: sw.ptq.rtn(stage.model, q, skip=[SKIP])),
        ("scale search", lambda: sw.ptq.rtn(stage.model, searched, skip=[SKIP])),
    ):
        stage.model.load_state_dict(weights)
        rule()
        found[name] = losses(stage)
    stage.model.load_state_dict(weights)
    seen = [{"input_ids": batch(step)[:, :-1], "use_cache": False} for step in range(CALIBRATION)]
    gptq(stage.model, searched, seen, skip=[SKIP], forward=stage.calibrating)
    found["gptq"] = losses(stage)
    return found


def speed(stage: Stage, batch: Batch) -> float:
    """Return seconds per step, after what is compiled is compiled."""
    optimizer = adamw(stage, 0.0)
    train(stage, optimizer, lambda step: 0.0, PROBE // 2, batch)
    _wait(stage)
    begun = time.perf_counter()
    train(stage, optimizer, lambda step: 0.0, PROBE, batch)
    _wait(stage)
    return (time.perf_counter() - begun) / PROBE


def arm(stage: Stage, name: str, bits: int, begin: dict[str, Tensor], rate: Rate, steps: int, batch: Batch, *, seed: int) -> Tensor:
    """Train by a method from given weights, and return the losses of what would ship."""
    scale = stage.scale
    stage.model.load_state_dict(begin)
    optimizer = adamw(stage, rate(0))
    method = method_of(name, sw.intn(bits, block=scale.block), scale.rows * scale.length)
    attached = sw.attach(stage.model, method, optimizer, skip=[SKIP], seed=seed)
    train(stage, optimizer, rate, steps, batch)
    attached.finalize()
    return losses(stage)


def rehearsed(stage: Stage, bits: int, batch: Batch) -> float:
    """Return the seconds that a width takes besides its steps; weights are what they were."""
    begin, begun = _copy(stage.model), time.perf_counter()
    rounded(stage, bits, begin, batch)
    for name in METHODS:
        arm(stage, name, bits, begin, lambda step: 1e-6, 2, batch, seed=0)
    _wait(stage)
    stage.model.load_state_dict(begin)
    return time.perf_counter() - begun


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that was measured."""
    began, scale = time.perf_counter(), TOY if options.toy else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(scale.architecture, length=scale.length, seed=options.seed).to(device)
    pieces, held = text(scale)
    stage = Stage(model, torch.compile(model) if device.type == "cuda" else model, pieces.to(device), held, scale, device)
    widths = [int(bits) for bits in options.bits.split(",")]
    first, later = batches(stage, seed=options.seed), batches(stage, seed=options.seed + 1)
    seconds = speed(stage, first)
    other = rehearsed(stage, widths[0], later)
    if scale.steps is None:
        left = (60 * options.minutes - (time.perf_counter() - began) - len(widths) * other) * RESERVE / seconds
        whole, each = int(left / 2), int(left / 2 / (1 + len(METHODS) * len(widths)))
    else:
        whole, each = scale.steps
    if min(whole, each) < PROBE:
        raise SystemExit(f"{options.minutes} minutes are {whole} and {each} steps here: too few. Give more, or fewer --bits.")
    arms = 1 + len(METHODS) * len(widths)
    _say(f"{seconds:.3f} s a step, {other:.0f} s a width besides: {whole} steps in full precision, then {each} for each of {arms}")
    top = options.lr
    train(stage, adamw(stage, 2 * top), lambda step: min(1.0, (step + 1) / 100) * cosine(2 * top, top, steps=whole)(step), whole, first)
    begin, fall = _copy(model), linear(top, 0, steps=each)
    found: dict[str, dict[str, Tensor]] = {}
    train(stage, adamw(stage, top), fall, each, later)
    found["float"], finished = {"float": losses(stage)}, _copy(model)
    for bits in widths:
        found[str(bits)] = rounded(stage, bits, finished, later)
        for name in METHODS:
            found[str(bits)][name] = arm(stage, name, bits, begin, fall, each, later, seed=options.seed)
            _say(f"{bits} bits, {name}: {float(found[str(bits)][name].mean()):.4f}, {time.perf_counter() - began:.0f} s")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return {
        "machine": machine, "torch": torch.__version__, "toy": options.toy, "seed": options.seed, "lr": top, "seconds_per_step": seconds,
        "seconds_per_width": other, "steps": [whole, each], "tokens_per_step": scale.rows * scale.length, "bytes_of_text": len(pieces),
        "rows": rows_of(found),
    }  # fmt: skip


def rows_of(found: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Return the table: mean loss, and the difference to STE at the same width with its interval."""
    rows = []
    for bits, arms in found.items():
        for name, loss in arms.items():
            gap = loss - arms["ste"] if "ste" in arms and name != "ste" else None
            error = None if gap is None else 1.96 * float(gap.std()) / math.sqrt(len(gap))
            rows.append(
                {
                    "bits": bits,
                    "method": name,
                    "loss": float(loss.mean()),
                    "to_ste": None if gap is None else float(gap.mean()),
                    "interval": error,
                }
            )
    return rows


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _wait(stage: Stage) -> None:
    if stage.device.type == "cuda":
        torch.cuda.synchronize(stage.device)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu_methods.json")
    options = parser.parse_args()
    result = run(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}; {result['steps'][0]} + {result['steps'][1]} steps of {result['tokens_per_step']} bytes; nats per byte")
    print(f"{'bits':<6} {'method':<14} {'loss':>8} {'to STE':>9} {'+-':>7}")
    for row in result["rows"]:
        gap = "" if row["to_ste"] is None else f"{row['to_ste']:>+9.4f} {row['interval']:>7.4f}"
        print(f"{row['bits']:<6} {row['method']:<14} {row['loss']:>8.4f} {gap}")


if __name__ == "__main__":
    main()
