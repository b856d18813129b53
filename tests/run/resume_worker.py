"""Resume saved runs in a fresh process: `python -m tests.run.resume_worker FOLDER` reads FOLDER/*.pt and writes FOLDER/*.end.

Every file holds the model's and the optimizer's state dictionary, and the name of its case. Model and optimizer are built from scratch,
the model from another seed, so that nothing but the two dictionaries can carry the run over.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tests.cases import METHODS
from tests.run.throwaway import everything
from tests.run.training import OPTIMIZERS, batches, network, ones, train

import stepwell as sw
from stepwell.methods.base import Method

STEPS = 6
Q = sw.int3(block=16)
AFFINE = sw.intn(3, block=16, levels="affine")


class Case(NamedTuple):
    """A method, an optimizer and the options of `attach`."""

    method: Callable[[torch.nn.Module], Method]
    optimizer: str = "adamw foreach"
    start: int = 0
    frozen: str = ""


CASES = {
    "ste, sgd": Case(lambda model: sw.ste(Q), "sgd"),
    "ste, momentum": Case(lambda model: sw.ste(Q), "sgd momentum foreach"),
    "ste, for-loop": Case(lambda model: sw.ste(Q), "adamw for-loop"),
    "ste, fused": Case(lambda model: sw.ste(Q), "adamw fused"),
    "ste, amsgrad": Case(lambda model: sw.ste(sw.nvfp4()), "adamw amsgrad"),
    "ste, later": Case(lambda model: sw.ste(Q), start=3),
    "ste, frozen": Case(lambda model: sw.ste(AFFINE), frozen="2.weight"),
    "ste, frozen, later": Case(lambda model: sw.ste(AFFINE), start=2, frozen="2.weight"),
    "clipped ste": Case(lambda model: sw.ste(Q, clip=0.8)),
    "searched": Case(lambda model: sw.ste(sw.intn(3, block=16, scale="mse"))),
    "searched, affine": Case(lambda model: sw.ste(sw.intn(3, block=16, scale="mse", levels="affine")), start=2),
    "searched, e4m3": Case(lambda model: sw.lotion(sw.intn(3, block=16, scale="mse", scale_dtype="e4m3"), loss_terms=64)),
    "lotion": Case(lambda model: sw.lotion(Q, loss_terms=64)),
    "lotion, fused": Case(lambda model: sw.lotion(Q, loss_terms=64), "adamw fused"),
    "ste, one pass": Case(lambda model: sw.ste(Q), "stepwell adamw"),
    "searched, one pass": Case(lambda model: sw.ste(sw.intn(3, block=16, scale="mse")), "stepwell adamw"),
    "lotion, one pass": Case(lambda model: sw.lotion(Q, loss_terms=64), "stepwell adamw"),
    "ste + lotion, one pass, later": Case(lambda model: sw.lotion(Q, loss_terms=64, forward="nearest"), "stepwell adamw", start=2),
    "lotion, radam": Case(lambda model: sw.lotion(Q, loss_terms=64), "radam"),
    "lotion, later": Case(lambda model: sw.lotion(Q, loss_terms=64), start=2),
    "lotion, sgd": Case(lambda model: sw.lotion(Q, curvature=ones(model)), "sgd momentum foreach"),
    "ste + lotion": Case(lambda model: sw.lotion(Q, loss_terms=64, forward="nearest"), "adam for-loop"),
    "ste + lotion, affine": Case(lambda model: sw.lotion(AFFINE, loss_terms=64, forward="nearest")),
    **{f"every method: {name}": Case(lambda model, name=name: METHODS[name](Q)) for name in METHODS},
    "default, e8m0": Case(lambda model: METHODS["default"](sw.intn(2, block=16, scale_dtype="e8m0"))),
    "default, fused, later": Case(lambda model: METHODS["default"](sw.intn(3, block=16, levels="full")), "adamw fused", start=2),
    "own curvature, sgd": Case(lambda model: METHODS["own curvature"](Q), "sgd momentum foreach"),
    "lsq, frozen": Case(lambda model: sw.lsq(Q), frozen="2.weight"),
    **{name: Case(lambda model, name=name: everything(Q)[name]) for name in everything(Q)},
    "randomized, later": Case(lambda model: everything(Q)["randomized"], start=2),
}


def build(name: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, sw.Run]:
    """Return the model, optimizer and run of a case, from scratch."""
    case, model = CASES[name], network(seed)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key != case.frozen)
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, sw.attach(model, case.method(model), optimizer, start=case.start, seed=11, refit=3)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = batches(STEPS)
    for path in sorted(folder.glob("*.pt")):
        saved = torch.load(path, weights_only=True)
        model, optimizer, run = build(saved["case"], seed=99)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, data[saved["step"] :])
        assert run.steps == STEPS
        ended = copy.deepcopy({"weights": model.state_dict(), "optimizer": optimizer.state_dict()})
        ended["codes"] = {name: encoded.codes for name, encoded in run.finalize().items()}
        torch.save(ended, path.with_suffix(".end"))


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("error")  # a resumed run has nothing to warn about
    warnings.filterwarnings("ignore", message=".*curvature is not the task.*")  # Adam with L2 decay says so at every attach
    warnings.filterwarnings("ignore", message=".*saturates")  # so do searched scales under a penalty
    main(Path(sys.argv[1]))
