"""Does a fused update do what float64 does? Every path of every method on random weights and gradients, against the reference, one table.

    python benchmarks/gpu/updates.py [--toy] [--out benchmarks/results/gpu_updates.json]

Paths: the passes around torch's fused AdamW, eager and through torch.compile, and, where triton is importable, `sw.optim.AdamW` with
STEPWELL_KERNEL=triton. The reference is the eager path in float64 on the CPU: same weights, same gradients, 10 steps, rate 1e-3. Gradients
are random, so that nobody gains from a smooth problem. Methods whose scales begin with a search are left out: between two scales that are
as good to the last digit, float32 and float64 choose differently.

A latent weight that lies on a grid point to rounding error is pushed one way or the other by LOTION, and one that lies on a border is
rounded one way or the other: float32 decides both by itself. So the table has the median error, in units of the last place of the weight,
and the share of weights that are off by more than a thousandth of a step; a kernel that is wrong is wrong almost everywhere.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import processor

import stepwell as sw
from stepwell.methods.base import Method
from stepwell.optim import engines
from stepwell.run.notices import SaturationWarning
from stepwell.schedules import linear

STEPS, RATE, TERMS = 10, 1e-3, 4096
OFF = 1e-3 * RATE  # beyond this a weight counts as off
SHARE, MEDIAN = 5e-3, 8.0  # what a path may show: weights that are off, and the median error in units of the last place


Ends = tuple[torch.Tensor, torch.Tensor]


class Case(NamedTuple):
    """One method on one shape; `grid` names what the grid is."""

    name: str
    grid: str
    method: Method
    shape: tuple[int, int]


def cases(toy: bool) -> list[Case]:
    """Return methods times grids; shapes are those of a 150 million weight model's layers, or small."""
    grids = {
        "int4 block 32": sw.int4(block=32),
        "int3 block 64, full": sw.intn(3, block=64, levels="full"),
        "int8 channel": sw.intn(8, block="channel"),
        "nvfp4": sw.nvfp4(),
    }
    methods = {
        "ste": sw.ste,
        "lotion": lambda q: sw.lotion(q, loss_terms=TERMS),
        "ste + lotion": lambda q: sw.lotion(q, loss_terms=TERMS, forward="nearest"),
        "parq": lambda q: sw.parq(q, slope=linear(1, 0, steps=STEPS)),
    }
    shape = (48, 128) if toy else (2048, 768)
    return [Case(name, grid, made(q), shape) for grid, q in grids.items() for name, made in methods.items()]


def paths(device: torch.device) -> Iterator[str]:
    """Yield the paths that this machine has."""
    yield "eager"
    yield "compiled"
    if find_spec("triton") is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        yield "triton"


def trained(case: Case, path: str, device: torch.device, dtype: torch.dtype) -> Ends | None:
    """Return the latent and the deployed weight after ten steps with given gradients; None where the path does not serve."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(case.shape[1], case.shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(case.shape, generator=generator) * 0.05)
    model.to(device, dtype)
    if path == "triton":
        os.environ[engines.VARIABLE] = "triton"
        engines.best.cache_clear()
        optimizer: torch.optim.Optimizer = sw.optim.AdamW(model.parameters(), lr=RATE)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    try:
        run = sw.attach(model, case.method, optimizer, compile=None if path == "triton" else path == "compiled")
        if (path == "triton") != (run._stepper.path == "one-pass"):
            return None  # a method that the kernel does not know goes through the passes
        for _ in range(STEPS):
            model.weight.grad = (torch.randn(case.shape, generator=generator) * 1e-3).to(device, dtype)
            optimizer.step()
        shown = model.weight.detach().clone()
        with run.latent():
            latent = model.weight.detach().clone()
        run.detach()
    finally:
        os.environ.pop(engines.VARIABLE, None)
        engines.best.cache_clear()
    return latent.double().cpu(), shown.double().cpu()


def compared(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield how far each path is from the reference."""
    expected = trained(case, "eager", torch.device("cpu"), torch.float64)
    assert expected is not None
    for path in paths(device):
        found = trained(case, path, device, torch.float32)
        if found is not None:
            yield row_of(case, path, found, expected)


def row_of(case: Case, path: str, found: Ends, expected: Ends) -> dict[str, Any]:
    """Return a path's line of the table."""
    error = (found[0] - expected[0]).abs()
    place = expected[0].abs().clamp(min=1e-3) * 2.0**-23
    median, off = float((error / place).median()), float((error > OFF).double().mean())
    flipped = float(((found[1] - expected[1]).abs() > 1e-3 * expected[1].abs().clamp(min=1e-3)).double().mean())
    good = median <= MEDIAN and off <= SHARE and flipped <= SHARE
    return {"case": case.name, "grid": case.grid, "path": path, "median_ulp": median, "off": off, "flipped": flipped, "good": good}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu_updates.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.simplefilter("ignore", SaturationWarning)  # a grid whose lowest code is no mirror of the highest saturates: known
    rows = [row for case in cases(options.toy) for row in compared(case, device)]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "toy": options.toy, "rows": rows}, indent=1) + "\n")
    print(f"{machine}; torch {torch.__version__}; {STEPS} steps at {RATE:g} against float64")
    print(f"{'method':<18} {'grid':<20} {'path':<9} {'median ulp':>10} {'off':>9} {'flipped':>9}")
    for row in rows:
        numbers = f"{row['median_ulp']:>10.2f} {row['off']:>9.1e} {row['flipped']:>9.1e}"
        print(f"{row['case']:<18} {row['grid']:<20} {row['path']:<9} {numbers}{'' if row['good'] else '  WRONG'}")
    if not all(row["good"] for row in rows):
        raise SystemExit("some updates are not what float64 gives")


if __name__ == "__main__":
    main()
