"""What does an optimizer step cost with a method in it? torch's AdamW, passes around it, and `sw.optim.AdamW` in one pass.

    python benchmarks/optim.py [--rounds 20] [--out benchmarks/results/optim.json]

Ten million float32 parameters, all of them quantized to int4 in blocks of 32, as one matrix and as the 84 matrices of a 12-layer
transformer; no forward or backward pass. Every round steps each variant once, in an order that rotates, and a ratio is the median over
rounds of variant / torch's fused AdamW *within the round*, so that a drifting machine cancels; processor time of the one thread, so that
others on the machine do not count. The floor is the least memory traffic that a step can have (28 bytes a parameter: weight, gradient and
two moments in, weight and two moments out; 32 where a rounded copy is written as well) at the higher bandwidth of a copy and of a product
in place, measured in the same run. Compilation is timed in processes of its own, with empty caches and again with what the first one left.
Needs a C compiler and `pip install "stepwell[fast]"`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import processor
from torch import nn

import stepwell as sw
from stepwell.optim import engines
from stepwell.run import fused

BLOCK, TERMS, RATE = 32, 1024, 1e-5
WIDTH, HIDDEN, LAYERS = 256, 704, 12
FLOOR_BYTES = {"": 28, "lotion": 28, "ste": 32, "ste + lotion": 32}
METHODS: dict[str, Callable[[], sw.methods.base.Method]] = {
    "lotion": lambda: sw.lotion(sw.int4(block=BLOCK), loss_terms=TERMS),
    "ste": lambda: sw.ste(sw.int4(block=BLOCK)),
    "ste + lotion": lambda: sw.lotion(sw.int4(block=BLOCK), loss_terms=TERMS, forward="nearest"),
}
TORCH = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
REFERENCE = "torch fused"
LOADING = """
import os, sys, torch
from stepwell.optim import engines
before = sum(os.times()[:4])  # of this process and the compiler that it starts
assert engines.load(sys.argv[1]) is not None
print(sum(os.times()[:4]) - before)
"""


def one_matrix() -> nn.Module:
    return nn.Sequential(nn.Linear(3200, 3125, bias=False))


def transformer() -> nn.Module:
    def layer() -> list[nn.Module]:
        square = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)]
        wide = [nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2)]
        return [*square, *wide, nn.Linear(HIDDEN, WIDTH, bias=False)]

    return nn.Sequential(*(matrix for _ in range(LAYERS) for matrix in layer()))


SHAPES = {"one matrix": one_matrix, "84 matrices": transformer}


def variants() -> list[str]:
    found = [f"torch {name}" for name in TORCH] + ["one pass, no method"]
    for method in METHODS:
        found += [f"{method}: one pass, {name}" for name in engines.NAMES]
        found += [f"{method}: numba passes around torch fused", f"{method}: compiled passes around torch fused"]
    return found


def prepare(variant: str, build: Callable[[], nn.Module]) -> Callable[[], object]:
    """Return the step of one variant, on a model and gradients of its own."""
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
    method, _, how = variant.rpartition(": ")
    if variant.startswith("torch"):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, **TORCH[variant.removeprefix("torch ")])
    elif "one pass" in variant:
        optimizer = sw.optim.AdamW(model.parameters(), lr=RATE)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    if not method:
        return optimizer.step
    name = how.removeprefix("one pass, ")
    engine = engines.load(name) if name in engines.NAMES else None
    run = sw.attach(model, METHODS[method](), optimizer, compile=True if how.startswith("compiled") else None)

    def step() -> None:
        with chosen(engine):
            optimizer.step()

    step()
    path = "one-pass" if engine else "compiled" if how.startswith("compiled") else "numba"
    assert f"{path} path" in repr(run), repr(run)
    return step


class chosen:  # noqa: N801
    """Let one kernel be the best there is while a block runs."""

    def __init__(self, engine: engines.Engine | None) -> None:
        self.engine, self.before = engine, engines.best

    def __enter__(self) -> None:
        if self.engine is not None:
            engines.best = lambda: self.engine  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        engines.best = self.before


def bandwidth() -> dict[str, float]:
    """Return bytes per second of a copy and of a product in place, 20 million float32 elements, beyond most caches: read plus write."""
    source, target = torch.zeros(20_000_000), torch.zeros(20_000_000)
    found = {}
    for name, work in (("copy", lambda: target.copy_(source)), ("in place", lambda: target.mul_(1.0))):
        times = []
        for _ in range(15):
            before = time.process_time()
            work()
            times.append(time.process_time() - before)
        found[name] = 2 * 4 * source.numel() / min(times)
    return found


def measure(shape: str, rounds: int, warmup: int = 3) -> dict[str, object]:
    """Return every variant's times and ratios for one way to cut ten million parameters."""
    torch.set_num_threads(1)
    fastest = bandwidth()
    names = variants()
    steps = {name: prepare(name, SHAPES[shape]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            before = time.process_time()
            steps[name]()
            if turn >= warmup:
                times[name].append(time.process_time() - before)
        print(f"\r{shape}: round {turn + 1} of {warmup + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    count = sum(parameter.numel() for parameter in SHAPES[shape]().parameters())
    rows = {}
    for name in names:
        ratios = sorted(a / b for a, b in zip(times[name], times[REFERENCE], strict=True))
        floor = FLOOR_BYTES[name.rpartition(": ")[0]] * count / max(fastest.values())
        rows[name] = {
            "ms": 1e3 * statistics.median(times[name]),
            "best_ms": 1e3 * min(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "best_ratio": min(times[name]) / min(times[REFERENCE]),
            "over_floor": statistics.median(times[name]) / floor,
        }
    return {"parameters": count, "gb_per_s": {name: value / 1e9 for name, value in fastest.items()}, "variants": rows}


def compile_seconds() -> dict[str, list[float]]:
    """Return how much processor time each kernel takes to be there, with an empty cache and with the one that this left."""
    found: dict[str, list[float]] = {}
    for name in engines.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "XDG_CACHE_HOME": folder, "NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-c", LOADING, name]
            runs = [subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)]
            found[name] = [float(out) for out in runs]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optim.json")
    parser.add_argument("--shape", choices=SHAPES, help="measure this one and print it as JSON")
    options = parser.parse_args()
    if options.shape:
        print(json.dumps(measure(options.shape, options.rounds)))
        return
    missing = [name for name in engines.NAMES if engines.load(name) is None]
    if missing or fused.kernels() is None:
        raise SystemExit("needs a C compiler and numba: pip install 'stepwell[fast]'")
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--rounds", str(options.rounds), "--shape"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shapes = {
        shape: json.loads(subprocess.run([*command, shape], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for shape in SHAPES
    }
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "load_before": load,
        "compile_seconds": compile_seconds(),
        "shapes": shapes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}; load {load:.1f}")
    for name, (first, again) in result["compile_seconds"].items():  # type: ignore[attr-defined]
        print(f"kernel in {name}: {first:.1f} s the first time, {again:.2f} s from its cache")
    for shape, found in shapes.items():
        print(f"\n{shape}, {found['parameters']:,} parameters; " + ", ".join(f"{k} {v:.1f} GB/s" for k, v in found["gb_per_s"].items()))
        print(f"{'':<50} {'ms':>7} {'best':>7} {'x fused':>8} {'best x':>7} {'x floor':>8}")
        for name, row in found["variants"].items():
            numbers = f"{row['ms']:>7.1f} {row['best_ms']:>7.1f} {row['ratio']:>8.2f} {row['best_ratio']:>7.2f} {row['over_floor']:>8.2f}"
            print(f"{name:<50} {numbers}")


if __name__ == "__main__":
    main()
