"""What does GPTQ of one layer cost, and how much error does it leave? Ours and the plain column loop, interleaved in one run.

    python benchmarks/gptq.py [--rounds 15] [--size 1024] [--out benchmarks/results/gptq.json]

One weight `(size, size)` of normal numbers, and the Hessian of 4 * size correlated inputs with a few strong directions, float32, one
thread, damping 1 %. "plain loop" is the published algorithm (Frantar et al., arXiv:2210.17323, algorithm 1 with lazy batches of 128
columns) in straightforward torch: inverse Hessian, its Cholesky factor, and a rank-one update of the batch per column. Both get the same
scales, so their weights must be equal but for near ties. Times are those of the whole call from Hessian to weights, scales included; a
ratio is the median over rounds of ours / variant within the round. The error is `sum (q - w)^T H (q - w)` over rows, as a share of round to
nearest on the same grid. Peers: torchao's GPTQ (prototype, 0.18) refuses CPUs.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import processor
from torch import Tensor

import stepwell as sw
from stepwell.ptq.sequential import sequential

ROOT = Path(__file__).parents[1]
DAMPING, BATCH = 0.01, 128
GRIDS = {"int4 block 128": sw.int4(block=128), "int8 channel": sw.int8(block="channel")}


def problem(size: int) -> tuple[Tensor, Tensor]:
    """Return a weight and a Hessian `(size, size)`."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(size) + 0.5 * torch.randn(size, size, generator=generator) / size**0.5
    strong = torch.randn(size, 4, generator=generator) @ torch.randn(4, size, generator=generator) / size**0.5
    inputs = torch.randn(4 * size, size, generator=generator) @ (mix + strong)
    return torch.randn(size, size, generator=generator), inputs.T @ inputs / len(inputs)


def plain_loop(weight: Tensor, hessian: Tensor, quantizer: sw.Quantizer) -> Tensor:
    """Round column after column and push every error onto the columns to come."""
    scale, top = quantizer.scale(weight), quantizer.format.high
    columns = weight.shape[1]
    length = columns // scale.shape[1]
    rest, rounded = weight.clone(), torch.zeros_like(weight)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        batch, errors = rest[:, start:stop].clone(), torch.zeros_like(rest[:, start:stop])
        for j in range(stop - start):
            step, column = scale[:, (start + j) // length], batch[:, j]
            rounded[:, start + j] = step * (column / step).round().clamp(-top, top)
            error = (column - rounded[:, start + j]) / factor[start + j, start + j]
            batch[:, j:] -= error[:, None] @ factor[start + j, start + j : stop][None]
            errors[:, j] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def variants(weight: Tensor, hessian: Tensor) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Return what is compared on each grid."""
    found: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, quantizer in GRIDS.items():
        found[name] = {
            "ours": lambda q=quantizer: sequential(weight, hessian, q, damping=DAMPING).decode(),
            "plain loop": lambda q=quantizer: plain_loop(weight, hessian, q),
        }
    return found


def measure(compared: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of every variant in every round; the order rotates, and one round more warms up."""
    names, times = list(compared), {name: [] for name in compared}
    for turn in range(rounds + 1):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            before = time.perf_counter()
            compared[name]()
            if turn:
                times[name].append(time.perf_counter() - before)
        print(f"\rround {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gptq.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight, hessian = problem(options.size)

    def lost(rounded: Tensor) -> float:
        delta = (rounded - weight).double()
        return float(((delta @ hessian.double()) * delta).sum())

    rows: dict[str, dict[str, dict[str, float]]] = {}
    for grid, compared in variants(weight, hessian).items():
        times, base = measure(compared, options.rounds), lost(GRIDS[grid](weight))
        ours = compared["ours"]()
        rows[grid] = {
            name: {
                "median_ms": 1e3 * statistics.median(row),
                "best_ms": 1e3 * min(row),
                "ours_over_this": statistics.median(a / b for a, b in zip(times["ours"], row, strict=True)),
                "error_over_rtn": lost(compared[name]()) / base,
                "weights_unlike_ours": float(((compared[name]() - ours).abs() > 1e-5).double().mean()),
            }
            for name, row in times.items()
        }
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "size": options.size,
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
        "grids": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["machine"])
    print(f"{'grid':<16} {'variant':<12} {'best ms':>8} {'median':>8} {'ours / this':>12} {'error / RTN':>12} {'unlike ours':>12}")
    for grid, compared_rows in rows.items():
        for name, row in compared_rows.items():
            numbers = f"{row['best_ms']:>8.1f} {row['median_ms']:>8.1f} {row['ours_over_this']:>12.3f} {row['error_over_rtn']:>12.5f}"
            print(f"{grid:<16} {name:<12} {numbers} {row['weights_unlike_ours']:>12.6f}")


if __name__ == "__main__":
    main()
