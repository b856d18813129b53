"""The byte language model of benchmarks/estimating, read and not written: same base, data, steps and test part. Running it does nothing.

A run here is 250 steps from the shared base with the weights on one grid; what it is compared with is the full-precision run of the same
data in benchmarks/results/estimators.csv.
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache

import torch
from shared import ROOT, read
from torch import Tensor, nn

import stepwell as sw
from stepwell.methods.base import Method

sys.path.insert(0, str(ROOT / "benchmarks"))

from estimating.lab import SKIP, STEPS, TERMS, Lab, Student

__all__ = ["SEEDS", "SKIP", "STEPS", "TERMS", "Lab", "control", "ended", "trained"]

SEEDS = (1, 2, 3)  # 0 is for choosing
CONTROL, CONTROL_BITS, DRAWS = "full precision", "32", 3


@cache
def control() -> dict[int, float]:
    """Return the test loss of full precision with the same steps, by seed; nothing where the benchmark has not been run."""
    rows = read(ROOT / "benchmarks" / "results" / "estimators.csv")
    return {int(row["seed"]): float(row["rtn"]) for row in rows if row["method"] == CONTROL and row["split"] == "test"}


def trained(
    lab: Lab, method: Method, rate: float, seed: int, prepare: Callable[[Student, sw.Run], None] | None = None
) -> tuple[nn.Module, sw.Run]:
    """Return the base after 250 steps under a method; `prepare` may look at it before the first."""
    student = lab.student(rate, seed)
    run = sw.attach(student.model, method, student.optimizer, skip=SKIP, seed=seed)
    if prepare is not None:
        prepare(student, run)
    lab.train(student, run.loss)
    return student.model, run


def ended(lab: Lab, model: nn.Module, run: sw.Run, split: str) -> dict[str, float]:
    """End a run; return its losses rounded to nearest, at random (mean of three draws, none while a rate is chosen) and not at all."""
    with run.latent():
        latents = {name: value.detach().clone() for name, value in model.named_parameters()}
    encoded = run.finalize()
    rtn = lab.loss(model, split)
    return {"rtn": rtn} | ({} if split != "test" else at_random(lab, model, latents, encoded))


def at_random(lab: Lab, model: nn.Module, latents: Mapping[str, Tensor], encoded: Mapping[str, sw.Encoded]) -> dict[str, float]:
    """Return the test losses of the latent weights: rounded at random, and as they are; the model holds the latter afterwards."""
    held, generator, found = dict(model.named_parameters()), torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _ in range(DRAWS):
            for name, one in encoded.items():
                held[name].copy_(one.quantizer(latents[name], scale=one.scales, rounding=sw.stochastic(generator)))
            found.append(lab.loss(model, "test"))
        for name in encoded:
            held[name].copy_(latents[name])
    return {"rr": sum(found) / DRAWS, "latent": lab.loss(model, "test")}
