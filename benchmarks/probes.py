"""What do the probes cost on a 10-million-parameter model, in forward passes and in copies of the weights?

    python benchmarks/probes.py [--rounds 3] [--out benchmarks/results/probes.json]

Model: a byte-level transformer of 8 layers, width 320 (9.8 of its 10.1 million parameters are block weights, which are what the probes
move), trained for 100 steps on the interpreter's own standard library, so that its loss has a basin to measure. The loss is a mean over
8 x 128 held-out bytes, one thread, float32: a small probe set, on which work per weight (drawing directions, rounding) weighs heavily.

Time: processor seconds of a probe as a multiple of those of one forward pass without gradients, minima over rounds in which everything
takes turns. Probes whose defaults take hundreds of passes run with fewer, as their names say. "own" is what is left, in forward passes,
beyond the probe's own passes at the price of a forward pass and of a gradient. Tier 0 (`rho_fn` on one grid and on twelve, `advise` without
measurements on twelve) must stay within 60; its figure includes rounding the model to every grid, with a search for the scales in eight of
the twelve.

Memory: growth of the peak resident size beyond what the caller's own model and loss need, in a process of its own, in units of all weights.
That is a forward pass; for probes that differentiate it is a forward and a backward pass whose gradients are dropped one by one, so that
gradients which a probe keeps count as its own. Points that the probe is given are there before. The allocator's mmap threshold is fixed, so
that freed tensors leave the process. Where more than one copy is needed, `REASONS` says what for.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import processor
from torch import Tensor, nn

import stepwell as sw
from stepwell.probes.stage import Cost
from stepwell.train.corpus import load_corpus
from stepwell.train.transformer import byte_loss, byte_transformer

WIDTH, LAYERS, LENGTH, BATCH, TRAINED = 320, 8, 128, 8, 100
SCHEMES = {
    "tensor mse": {"block": None, "scale": "mse"},
    "channel mse": {"block": "channel", "scale": "mse"},
    "tensor absmax": {"block": None},
}
GRIDS = [sw.intn(bits, **options) for options in SCHEMES.values() for bits in (8, 4, 3, 2)]  # type: ignore[arg-type]
GRID = sw.intn(3, block="channel", scale="mse")
SKIP = ["head"]
TIER_0 = ("rho_fn", "rho_fn, 12 grids", "advise, 12 grids")
# how the names of those begin that take some
GRADIENTS = ("quadratic", "exact_quadratic", "inward", "Log, one look", "neighbours", "box_qat", "control")
REASONS = {
    "exact_quadratic": "displacement and gradient, two copies; a graph of the gradient",
    "neighbours, 5 of 40 rounds": "how far codes moved, a byte per weight, then the codes found; a twentieth of all as steps to take",
    "box_qat, 10 of 240 steps": "training: latent weights, their gradient and Adam's two moments, four copies; codes found",
    "control, 10 of 240 steps": "training: latent weights, their gradient and Adam's two moments, four copies",
    "Log, one look": "the codes of the run, a byte per weight, and those of its health",
}
Loss = Callable[[nn.Module], Tensor]
Work = Callable[[], Any]


class Bench(NamedTuple):
    """The model, the loss and the data of its batches, the model's weights rounded to one grid, and other weights on a fine one."""

    model: nn.Module
    loss: Loss
    data: Tensor
    given: dict[str, sw.Encoded]
    aside: dict[str, sw.Encoded]


def sequences(text: Tensor, count: int, *, seed: int) -> Tensor:
    """Return `(count, LENGTH + 1)` pieces of a text."""
    starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).long()


def trained(text: Tensor) -> nn.Module:
    """Return the model after a short training."""
    model = byte_transformer(width=WIDTH, layers=LAYERS, heads=5, length=LENGTH, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(TRAINED):
        optimizer.zero_grad(set_to_none=True)
        byte_loss(model, sequences(text, BATCH, seed=step)).backward()
        optimizer.step()
        print(f"\rtraining {step + 1} of {TRAINED}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return model.eval().requires_grad_(True)


def bench(weights: Path) -> Bench:
    """Return what is measured, from saved weights."""
    model = byte_transformer(width=WIDTH, layers=LAYERS, heads=5, length=LENGTH, seed=0).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    data = sequences(load_corpus().validation, BATCH, seed=10**6)
    given = sw.probes.rounded(model, GRID, skip=SKIP)
    return Bench(model, lambda model: byte_loss(model, data), data, given, _aside(given))


def prepare(on: Bench) -> dict[str, Callable[[], Work]]:
    """Return what makes the work that is measured, by name."""
    model, loss, given = on.model, on.loss, on.given
    toward: dict[str, Any] = {"toward": given}
    some = dict(list(given.items())[:4])
    works: dict[str, Work] = {
        "rho_fn": lambda: sw.probes.rho_fn(model, loss, toward=GRID),
        "rho_fn, 12 grids": lambda: _twelve(on),
        "advise, 12 grids": lambda: sw.advise(model, byte_loss, on.data.split(1), quantizers=GRIDS, measure=False),
        "width": lambda: sw.probes.width(model, loss, **toward),
        "segment": lambda: sw.probes.segment(model, loss, **toward),
        "rho_self": lambda: sw.probes.rho_self(model, loss, **toward),
        "rho_uniform": lambda: sw.probes.rho_uniform(model, loss, **toward),
        "rho_cross": lambda: sw.probes.rho_cross(model, loss, **toward, coarse=given),
        "quadratic": lambda: sw.probes.quadratic(model, loss, **toward),
        "exact_quadratic": lambda: sw.probes.exact_quadratic(model, loss, **toward),
        "inward": lambda: sw.probes.inward(model, loss, at=given),
        "latent": lambda: sw.probes.latent(model, loss, at=given, start=model.state_dict()),
        "rho_layers, 4 of 32 tensors": lambda: sw.probes.rho_layers(model, loss, toward=some),
        "neighbours, 5 of 40 rounds": lambda: sw.probes.neighbours(model, loss, around=given, rounds=5),
        "plane, 4 x 4 of 17 x 17": lambda: sw.probes.plane(model, loss, **toward, across=on.aside, size=4),
        "box_qat, 10 of 240 steps": lambda: sw.probes.box_qat(model, loss, around=given, steps=10),
        "control, 10 of 240 steps": lambda: sw.probes.control(model, loss, around=given, steps=10),
    }
    return {**{name: lambda work=work: work for name, work in works.items()}, "Log, one look": lambda: _look(on)}  # type: ignore[misc]


def _twelve(on: Bench) -> Any:
    """Measure one width and twelve ratios; return the first, which paid for the width."""
    first = width = None
    for grid in GRIDS:
        ratio = sw.probes.rho_fn(on.model, on.loss, toward=grid, width=width)
        first, width = first or ratio, ratio.widths[0]
    return first


def _aside(given: dict[str, sw.Encoded]) -> dict[str, sw.Encoded]:
    """Return another point, as a stand-in for trained weights."""
    generator, fine = torch.Generator().manual_seed(0), sw.int8(block="channel")
    return {name: fine.encode(one.decode() + 0.01 * torch.randn(one.codes.shape, generator=generator)) for name, one in given.items()}


def _look(on: Bench) -> Work:
    """Return a look at a run on a copy of the model."""
    model = copy.deepcopy(on.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = sw.attach(model, sw.ste(GRID), optimizer, skip=SKIP)
    log = sw.probes.Log(run, on.loss, every=1)

    def work() -> Any:
        optimizer.step()  # without gradients it moves nothing, and the log looks
        return log.looks[-1]

    return work


def passes(on: Bench) -> dict[str, Work]:
    """Return the units: a forward pass, and a gradient by the weights that the probes move."""
    moved = [on.model.get_parameter(name) for name in on.given]

    def forward() -> None:
        with torch.no_grad():
            on.loss(on.model)

    return {"forward": forward, "gradient": lambda: torch.autograd.grad(on.loss(on.model), moved)}


def _dropped(on: Bench) -> None:
    """Differentiate the loss by the weights that the probes move, and drop each gradient when it is there."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    moved = [on.model.get_parameter(name) for name in on.given]
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in moved]
    on.loss(on.model).backward(inputs=moved)
    for handle in handles:
        handle.remove()


def cost(result: Any) -> Cost:
    """Return the passes that a probe counted."""
    return sum((one.cost for one in result), result.shared) if isinstance(result, list) else result.cost  # advice is a list of verdicts


def timings(on: Bench, rounds: int) -> tuple[dict[str, float], dict[str, Cost]]:
    """Return the least processor seconds of everything, and the passes of every probe."""
    works = {**passes(on), **{name: made() for name, made in prepare(on).items()}}
    least: dict[str, float] = {}
    counted: dict[str, Cost] = {}
    for turn in range(rounds):
        for name, work in works.items():
            for _ in range(5 if name in ("forward", "gradient") else 1):
                before = time.process_time()
                result = work()
                least[name] = min(least.get(name, 1e9), time.process_time() - before)
            if name not in ("forward", "gradient"):
                counted[name] = cost(result)
            print(f"\rround {turn + 1} of {rounds}: {name:<30}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return least, counted


def memory(name: str, weights: Path) -> float:
    """Return bytes by which a probe's peak exceeds that of its pass, measured in a fresh process."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--memory-of", name, "--weights", str(weights)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(name: str, weights: Path) -> None:
    on = bench(weights)
    work = prepare(on)[name]()
    unit = (lambda: _dropped(on)) if name.startswith(GRADIENTS) else passes(on)["forward"]
    peaks = []
    for measured in (unit, unit, work):  # the first pass warms up
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        measured()
        peaks.append(_resident("VmHWM") - before)
    print(peaks[2] - peaks[1])


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def summarise(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.save(trained(load_corpus().train).state_dict(), weights)
        on = bench(weights)
        size = 4 * sum(parameter.numel() for parameter in on.model.parameters())
        extra = {name: memory(name, weights) / size for name in prepare(on)}
        least, counted = timings(on, rounds)
    forward, gradient = least["forward"], least["gradient"]
    rows = {}
    for name, both in counted.items():
        expected = (both.forward - both.backward) * forward + both.backward * gradient
        rows[name] = {
            "forward_passes": both.forward,
            "backward_passes": both.backward,
            "time_in_forward_passes": least[name] / forward,
            "own_in_forward_passes": (least[name] - expected) / forward,
            "extra_copies_of_the_weights": extra[name],
            "tier_0": name in TIER_0,
            "held_besides_one_copy": REASONS.get(name, ""),
        }
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "rounds": rounds,
        "load": os.getloadavg()[0],
        "parameters": size // 4,
        "moved_weights": sum(one.codes.numel() for one in on.given.values()),
        "forward_ms": 1e3 * forward,
        "gradient_in_forward_passes": gradient / forward,
        "probes": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probes.json")
    parser.add_argument("--memory-of")
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    if options.memory_of:
        torch.set_num_threads(1)
        measure_memory(options.memory_of, options.weights)
        return
    result = summarise(options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}; {result['parameters']:,} parameters, forward pass {result['forward_ms']:.0f} ms")
    print(f"{'probe':<28} {'forward':>8} {'backward':>9} {'time / F':>9} {'own / F':>8} {'copies':>7}")
    for name, row in result["probes"].items():
        numbers = f"{row['forward_passes']:>8} {row['backward_passes']:>9} {row['time_in_forward_passes']:>9.1f}"
        mark = "  tier 0" if row["tier_0"] else ""
        print(f"{name:<28} {numbers} {row['own_in_forward_passes']:>8.1f} {row['extra_copies_of_the_weights']:>7.2f}{mark}")


if __name__ == "__main__":
    main()
