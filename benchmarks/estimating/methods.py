"""Methods: what is compared, in the order in which it is run. Running it does nothing.

Every arm is a function of the lab, the bits, the learning rate and the seed of the data, which returns the model with its weights on the
grid. Where an arm trains weights besides those (latent ones), it returns them too, so that randomized rounding can be measured.
LOTION's forms, which take randomized rounding for unbiased, run on "sym": "full" saturates at the end that its scale does not reach.
Grids: "sym" is -q..q, "full" has all 2^b codes and signed scales, "mid" half-odd codes; "all codes" is mid at 2 bits and full above. NVFP4
(4.5 bits: blocks of 16, scales in eight-bit floats) takes the place of all of them at its own width.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

import stepwell as sw
from estimating.lab import SKIP, Lab, Student
from stepwell.methods.base import Method
from stepwell.methods.binary_relax import binary_relax
from stepwell.methods.cage import cage
from stepwell.methods.coupled import coupled
from stepwell.methods.distill import distillation, plain
from stepwell.methods.faster import faster
from stepwell.methods.learned import held
from stepwell.methods.lsq import lsq
from stepwell.methods.parq import parq
from stepwell.methods.prox import prox
from stepwell.methods.sampled import sampled
from stepwell.methods.soft import soft
from stepwell.schedules import Schedule, exponential, linear, sigmoid
from stepwell.train.quantize import all_codes

CALIBRATION, CALIBRATION_SEED = 48, 7000  # batches for GPTQ
RATES = (1.5e-3, 2.2e-3, 3.2e-3)
HIGHER = (2.2e-3, 3.2e-3, 4.7e-3)  # as many tries around the larger rates that methods without a rounded forward pass like
INTEGERS, NVFP4, FLOAT_BITS = (4, 3, 2), 4.5, 32  # widths: bits per weight, NVFP4's with its scales
ALL = (*INTEGERS, NVFP4)
FREE = 0.8  # share of the run in which annealed methods come to the grid
FASTER = 2.0  # rows that say "faster": quantized weights have that multiple of the rate of the parameters in float
FLOAT = "full precision"
FASTER_FLOAT = "full precision, faster"
TAUGHT = "full precision, teacher"


class Finished(NamedTuple):
    """A model on its grid; latent weights by name and what they were rounded to, where there are any."""

    model: nn.Module
    latents: Mapping[str, Tensor] | None = None
    encoded: Mapping[str, sw.Encoded] | None = None


Start = Callable[[Lab, float, float, int], Finished]


class Arm(NamedTuple):
    """A row of the table.

    Attributes:
        kind: "control" has no grid, "ours" is what the library recommends, "peer" another library, "method" everything else.
        grid: which codes, in words.
        start: trains it.
        rates: learning rates that are tried at every width; none where nothing is trained.
        teacher: whether a full-precision model is its teacher, so that it is held against the control that has one too.
        widths: at which it can be run.
    """

    kind: Literal["control", "rounded", "ours", "method", "peer"]
    grid: str
    start: Start
    rates: tuple[float, ...] = RATES
    teacher: bool = False
    widths: tuple[float, ...] = INTEGERS


def grid(lab: Lab, bits: float, codes: str) -> sw.Quantizer:
    """Return the grid of an arm: "sym", "full", "mid" or "all codes"; NVFP4 at its width."""
    if bits == NVFP4:
        return sw.nvfp4()
    bits = int(bits)
    if codes == "all codes":
        return all_codes(sw.intn(bits, block=lab.block))
    return sw.intn(bits, block=lab.block, levels={"sym": "symmetric", "full": "full", "mid": "mid"}[codes])


def in_float(lab: Lab, bits: float, rate: float, seed: int, *, taught: bool = False) -> Finished:
    """Train on in full precision."""
    student = lab.student(rate, seed)
    lab.train(student, distillation(lab.teacher(seed)) if taught else plain)
    return Finished(student.model)


def in_float_faster(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
    """Train on in full precision, with a larger rate for the weights that the others quantize."""
    student = lab.student(rate, seed)
    apart(student, lab, FASTER)
    lab.train(student)
    return Finished(student.model)


def apart(student: Student, lab: Lab, multiplier: float) -> dict[str, Any]:
    """Give the weights that are quantized a parameter group of their own, with a multiple of the rate, and return it."""
    weights = [layer.weight for layer in inner(student.model, lab.skip).values()]
    chosen, group = {id(weight) for weight in weights}, student.optimizer.param_groups[0]
    group["params"] = [one for one in group["params"] if id(one) not in chosen]
    settings = {name: value for name, value in group.items() if name != "params"}
    student.optimizer.add_param_group({**settings, "params": weights, "peak": multiplier * student.rate})
    return student.optimizer.param_groups[-1]


def inner(model: nn.Module, skip: Sequence[str] = SKIP) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that are quantized."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and name not in skip}


def rounded(codes: str, rule: Literal["absmax", "mse"]) -> Start:
    """Return the start of an arm that trains in full precision and then rounds to nearest."""

    def start(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
        model = copy.deepcopy(lab.teacher(seed))
        q = replace(grid(lab, bits, codes), rule=rule)
        latents = {name: value.detach().clone() for name, value in model.named_parameters()}
        return Finished(model, latents, sw.ptq.rtn(model, q, skip=lab.skip))

    return start


def calibrated(codes: str) -> Start:
    """Return the start of an arm that trains in full precision and then rounds by GPTQ, at searched scales."""

    def start(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
        model = copy.deepcopy(lab.teacher(seed))
        q = replace(grid(lab, bits, codes), rule="mse")
        batches = [batch[:, :-1] for batch in lab.batches(CALIBRATION, CALIBRATION_SEED)]
        sw.ptq.gptq(model, q, [(batch,) for batch in batches], skip=lab.skip)
        return Finished(model)

    return start


def ours(codes: str, made: Callable[[sw.Quantizer, Lab], Method]) -> Start:
    """Return the start of an arm that one of the library's methods trains."""

    def start(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
        student = lab.student(rate, seed)
        run = sw.attach(student.model, made(grid(lab, bits, codes), lab), student.optimizer, skip=lab.skip, seed=seed)
        lab.train(student)
        return ended(student.model, run)

    return start


def default(lab: Lab, bits: float, rate: float, seed: int, *, taught: bool = False) -> Finished:
    """Train with `quantize_training`, as a user would call it."""
    student = lab.student(rate, seed)
    teacher = lab.teacher(seed) if taught else None
    q = sw.nvfp4() if bits == NVFP4 else sw.intn(int(bits), block=lab.block)
    options = {"steps": lab.steps, "loss_terms": lab.terms, "skip": lab.skip, "seed": seed}
    run = sw.quantize_training(student.model, student.optimizer, q, teacher=teacher, **options)
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


def whole(lab: Lab) -> int:
    """Return the steps after which annealed methods are on the grid."""
    return round(FREE * lab.steps)


def last(lab: Lab) -> Schedule:
    """Return CAGE's pull: over the last tenth of the run, from nothing to ten."""
    return linear(0, 10, steps=lab.steps // 10, begin=lab.steps - lab.steps // 10)


def growth(lab: Lab) -> Schedule:
    """Return how strong a proximal step is: from a tenth of theory's unit to a thousand of them."""
    return exponential(0.1, 1000, steps=lab.steps)


def arms() -> dict[str, Arm]:
    """Return all arms but the peers, by name."""
    lotion = ours("sym", lambda q, lab: sw.lotion(q, loss_terms=lab.terms))
    both = {codes: ours(codes, lambda q, lab: sw.lotion(q, loss_terms=lab.terms, forward="nearest")) for codes in ("sym", "full")}
    return {
        FLOAT: Arm("control", "none", in_float, widths=(FLOAT_BITS,)),
        "rtn, absmax": Arm("rounded", "sym", rounded("sym", "absmax"), rates=(), widths=ALL),
        "rtn, searched scales": Arm("rounded", "all codes", rounded("all codes", "mse"), rates=(), widths=ALL),
        "gptq, searched scales": Arm("rounded", "full", calibrated("full"), rates=()),
        "default": Arm("ours", "all codes", default, widths=ALL),
        "lsq, all codes": Arm("method", "all codes", ours("all codes", lambda q, lab: lsq(q))),
        "lsq, all codes, faster": Arm("method", "all codes", ours("all codes", lambda q, lab: faster(lsq(q), FASTER))),
        FASTER_FLOAT: Arm("control", "none", in_float_faster, widths=(FLOAT_BITS,)),
        "ste, full": Arm("method", "full", ours("full", lambda q, lab: sw.ste(q))),
        "lsq": Arm("method", "sym", ours("sym", lambda q, lab: lsq(q))),
        "ste": Arm("method", "sym", ours("sym", lambda q, lab: sw.ste(q)), widths=ALL),
        TAUGHT: Arm("control", "none", taught(in_float), HIGHER, teacher=True, widths=(FLOAT_BITS,)),
        "default, teacher": Arm("ours", "all codes", taught(default), rates=HIGHER, teacher=True),
        "lotion": Arm("method", "sym", lotion, rates=HIGHER, widths=ALL),
        "ste + lotion": Arm("method", "sym", both["sym"]),
        "ste + lotion, full": Arm("method", "full", both["full"]),
        "ste + prox": Arm(
            "method", "sym", ours("sym", lambda q, lab: prox(q, strength=growth(lab), loss_terms=lab.terms, forward="nearest"))
        ),
        "prox": Arm(
            "method", "sym", ours("sym", lambda q, lab: prox(q, strength=growth(lab), loss_terms=lab.terms)), rates=HIGHER, widths=ALL
        ),
        "parq": Arm("method", "mid", ours("mid", lambda q, lab: held(parq(q, slope=sigmoid(1, 0, steps=whole(lab)))))),
        "sampled": Arm("method", "sym", ours("sym", lambda q, lab: sampled(q))),
        "coupled": Arm("method", "sym", ours("sym", lambda q, lab: coupled(q, loss_terms=lab.terms)), rates=HIGHER),
        "binary relax": Arm("method", "full", ours("full", lambda q, lab: binary_relax(q, share=linear(0, 1, steps=whole(lab))))),
        "cage": Arm("method", "full", ours("full", lambda q, lab: cage(q, pull=last(lab)))),
        "soft": Arm("method", "full", ours("full", lambda q, lab: soft(q, temperature=exponential(0.5, 0.005, steps=whole(lab))))),
    }
