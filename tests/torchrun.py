"""A module on two ranks (gloo, on the CPU), as torchrun starts it, and what its workers write for the tests that read it."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def on_two_ranks(module: str, *arguments: object) -> str:
    """Run `python -m module` with these arguments on two ranks; return what it printed, fail with its last words."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def cases_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights that a worker found, by case and name."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "found.safetensors").items():
        case, _, name = key.partition("/")
        cases.setdefault(case, {})[name] = tensor
    return cases
