"""Methods: what is compared, in the order in which it is run. Running it does nothing.

Every arm is a function of the lab, the bits, the learning rate and the seed of the data, which returns the model with its weights on the
grid. Where an arm trains weights besides those (latent ones), it returns them too, so that randomized rounding can be measured.
LOTION's forms, which take randomized rounding for unbiased, run on "sym": "full" saturates at the end that its scale does not reach.
Grids: "sym" is -q..q, "full" has all 2^b codes and signed scales, "mid" half-odd codes; "all codes" is mid at 2 bits and full above.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

import stepwell as sw
from estimating.lab import BLOCK, SKIP, STEPS, TERMS, Lab
from stepwell.methods.base import Method
from stepwell.methods.binary_relax import binary_relax
from stepwell.methods.cage import cage
from stepwell.methods.coupled import coupled
from stepwell.methods.distill import distillation, plain
from stepwell.methods.learned import held
from stepwell.methods.lsq import lsq
from stepwell.methods.parq import parq
from stepwell.methods.prox import prox
from stepwell.methods.sampled import sampled
from stepwell.methods.soft import soft
from stepwell.schedules import exponential, linear, sigmoid
from stepwell.train.quantize import all_codes

CALIBRATION, CALIBRATION_SEED = 48, 7000  # batches for GPTQ
RATES = (1.5e-3, 2.2e-3, 3.2e-3)
HIGHER = (2.2e-3, 3.2e-3, 4.7e-3)  # as many tries around the larger rates that methods without a rounded forward pass like
FREE = 0.8  # share of the run in which annealed methods come to the grid
FLOAT = "full precision"
TAUGHT = "full precision, teacher"


class Finished(NamedTuple):
    """A model on its grid; latent weights by name and what they were rounded to, where there are any."""

    model: nn.Module
    latents: Mapping[str, Tensor] | None = None
    encoded: Mapping[str, sw.Encoded] | None = None


Start = Callable[[Lab, int, float, int], Finished]


class Arm(NamedTuple):
    """A row of the table.

    Attributes:
        kind: "control" has no grid, "ours" is what the library recommends, "peer" another library, "method" everything else.
        grid: which codes, in words.
        start: trains it.
        rates: learning rates that are tried; one where nothing is trained.
        teacher: whether a full-precision model is its teacher, so that it is held against the control that has one too.
    """

    kind: Literal["control", "rounded", "ours", "method", "peer"]
    grid: str
    start: Start
    rates: tuple[float, ...] = RATES
    teacher: bool = False


def grid(bits: int, codes: str) -> sw.Quantizer:
    """Return the grid of an arm: "sym", "full", "mid" or "all codes"."""
    if codes == "all codes":
        return all_codes(sw.intn(bits, block=BLOCK))
    return sw.intn(bits, block=BLOCK, levels={"sym": "symmetric", "full": "full", "mid": "mid"}[codes])


def in_float(lab: Lab, bits: int, rate: float, seed: int, *, taught: bool = False) -> Finished:
    """Train on in full precision."""
    student = lab.student(rate, seed)
    lab.train(student, distillation(lab.teacher(seed)) if taught else plain)
    return Finished(student.model)


def rounded(codes: str, rule: Literal["absmax", "mse"]) -> Start:
    """Return the start of an arm that trains in full precision and then rounds to nearest."""

    def start(lab: Lab, bits: int, rate: float, seed: int) -> Finished:
        model = copy.deepcopy(lab.teacher(seed))
        base = grid(bits, codes)
        q = sw.Quantizer(base.format, block=BLOCK, rule=rule)
        latents = {name: value.detach().clone() for name, value in model.named_parameters()}
        return Finished(model, latents, sw.ptq.rtn(model, q, skip=SKIP))

    return start


def calibrated(codes: str) -> Start:
    """Return the start of an arm that trains in full precision and then rounds by GPTQ, at searched scales."""

    def start(lab: Lab, bits: int, rate: float, seed: int) -> Finished:
        model = copy.deepcopy(lab.teacher(seed))
        q = sw.Quantizer(grid(bits, codes).format, block=BLOCK, rule="mse")
        batches = [batch[:, :-1] for batch in lab.batches(CALIBRATION, CALIBRATION_SEED)]
        sw.ptq.gptq(model, q, [(batch,) for batch in batches], skip=SKIP)
        return Finished(model)

    return start


def ours(codes: str, made: Callable[[sw.Quantizer], Method]) -> Start:
    """Return the start of an arm that one of the library's methods trains."""

    def start(lab: Lab, bits: int, rate: float, seed: int) -> Finished:
        student = lab.student(rate, seed)
        run = sw.attach(student.model, made(grid(bits, codes)), student.optimizer, skip=SKIP, seed=seed)
        lab.train(student)
        return ended(student.model, run)

    return start


def default(lab: Lab, bits: int, rate: float, seed: int, *, taught: bool = False) -> Finished:
    """Train with `quantize_training`, as a user would call it."""
    student = lab.student(rate, seed)
    teacher = lab.teacher(seed) if taught else None
    q = sw.intn(bits, block=BLOCK)
    run = sw.quantize_training(student.model, student.optimizer, q, steps=STEPS, loss_terms=TERMS, teacher=teacher, skip=SKIP, seed=seed)
    lab.train(student, run.loss)
    return ended(student.model, run)


def ended(model: nn.Module, run: sw.Run) -> Finished:
    """Leave the weights on the grid, and keep what was trained."""
    with run.latent():
        latents = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Finished(model, latents, run.finalize())


def taught(start: Callable[..., Finished]) -> Start:
    """Return a start with a teacher."""
    return lambda lab, bits, rate, seed: start(lab, bits, rate, seed, taught=True)


def arms() -> dict[str, Arm]:
    """Return all arms but the peers, by name."""
    annealed = {"steps": round(FREE * STEPS)}
    pull, growth = linear(0, 10, steps=STEPS // 10, begin=STEPS - STEPS // 10), exponential(0.1, 1000, steps=STEPS)
    return {
        FLOAT: Arm("control", "none", in_float),
        "rtn, absmax": Arm("rounded", "sym", rounded("sym", "absmax"), rates=()),
        "rtn, searched scales": Arm("rounded", "all codes", rounded("all codes", "mse"), rates=()),
        "gptq, searched scales": Arm("rounded", "full", calibrated("full"), rates=()),
        "default": Arm("ours", "all codes", default),
        "lsq, all codes": Arm("method", "all codes", ours("all codes", lsq)),
        "ste, full": Arm("method", "full", ours("full", sw.ste)),
        "lsq": Arm("method", "sym", ours("sym", lsq)),
        "ste": Arm("method", "sym", ours("sym", sw.ste)),
        TAUGHT: Arm("control", "none", taught(in_float), teacher=True),
        "default, teacher": Arm("ours", "all codes", taught(default), teacher=True),
        "lotion": Arm("method", "sym", ours("sym", lambda q: sw.lotion(q, loss_terms=TERMS)), rates=HIGHER),
        "ste + lotion": Arm("method", "sym", ours("sym", lambda q: sw.lotion(q, loss_terms=TERMS, forward="nearest"))),
        "ste + lotion, full": Arm("method", "full", ours("full", lambda q: sw.lotion(q, loss_terms=TERMS, forward="nearest"))),
        "ste + prox": Arm("method", "sym", ours("sym", lambda q: prox(q, strength=growth, loss_terms=TERMS, forward="nearest"))),
        "prox": Arm("method", "sym", ours("sym", lambda q: prox(q, strength=growth, loss_terms=TERMS)), rates=HIGHER),
        "parq": Arm("method", "mid", ours("mid", lambda q: held(parq(q, slope=sigmoid(1, 0, **annealed))))),
        "sampled": Arm("method", "sym", ours("sym", sampled)),
        "coupled": Arm("method", "sym", ours("sym", lambda q: coupled(q, loss_terms=TERMS)), rates=HIGHER),
        "binary relax": Arm("method", "full", ours("full", lambda q: binary_relax(q, share=linear(0, 1, **annealed)))),
        "cage": Arm("method", "full", ours("full", lambda q: cage(q, pull=pull))),
        "soft": Arm("method", "full", ours("full", lambda q: soft(q, temperature=exponential(0.5, 0.005, **annealed)))),
    }
