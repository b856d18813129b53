"""The tables that laws run over: every format, every quantizer, every training method, and the weights they are tried on.

`QUANTIZERS` is for `pytest.mark.parametrize`: a short list that has each idea once, then the full cross product marked slow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

import stepwell as sw
from stepwell import formats
from stepwell.formats import Format, integer
from stepwell.methods.base import Method
from stepwell.presets import fp4, fp8, intn, mxfp4, nvfp4, ternary
from stepwell.quantizers import Quantizer
from stepwell.schedules import exponential, linear, sigmoid
from stepwell.train.quantize import recipe

FORMATS = formats.formats()
WEIGHT_FORMATS = tuple(format for format in FORMATS if format != formats.E8M0)  # e8m0 is for scales: it has no zero and no sign

Q4_0 = intn(4, levels="full", scale_dtype="fp16")
Q4_1 = Quantizer(integer(4, "affine"), 32, scale_dtype="fp16", zero="minimum")

REPRESENTATIVES = (
    intn(2), intn(3, block=16), intn(4), intn(5, block="channel"), intn(6, block=None), intn(8, block=64), ternary(),
    intn(4, scale_dtype="fp16"), intn(8, scale_dtype="bf16"), intn(4, scale_dtype="e8m0"),
    intn(3, scale_dtype="e4m3"), intn(4, scale_dtype="e4m3"),
    intn(2, levels="full"), Q4_0, intn(8, levels="full", block="channel"), intn(4, levels="full", scale_dtype="e4m3"),
    intn(2, levels="mid"), intn(4, levels="mid", scale_dtype="bf16"), intn(3, levels="mid", scale_dtype="e8m0"),
    intn(2, levels="affine"), intn(4, levels="affine", scale_dtype="fp16"), intn(8, levels="affine", block=None), Q4_1,
    intn(4, scale="mse"), intn(3, scale="mse", levels="full", scale_dtype="fp16"), intn(4, scale="mse", levels="affine"),
    intn(2, scale="mse", scale_dtype="e4m3"), fp4(scale="mse", scale_dtype="e8m0"),
    intn(4, scale=0.25), intn(4, scale=0.3, levels="affine"), intn(4, scale=0.3, scale_dtype="e4m3", levels="full"),
    fp4(), fp4(block=None, scale_dtype="bf16"), fp8(), fp8(kind="e5m2", block=32), mxfp4(), mxfp4(rule="floor"), nvfp4(),
    intn(8, compute="bf16"), nvfp4(compute="bf16"), fp4(compute="fp16"),
)  # fmt: skip


def _every() -> list[Quantizer]:
    """Return format x scale rule x scale dtype x block, without what is refused when built (unsigned e8m0 scales under "full" levels)."""
    dtypes, rules, blocks = ("fp32", "fp16", "bf16", "e8m0", "e4m3"), ("absmax", "mse", 0.3), (16, 32, "channel", None)
    found = []
    for format, dtype, rule, block in product(WEIGHT_FORMATS, dtypes, rules, blocks):
        if dtype == "e8m0" and format.levels == "full":
            continue
        rounding = "up" if dtype == "e8m0" or (dtype == "e4m3" and rule != "mse") else "nearest"
        found.append(Quantizer(format, block, rule, dtype, rounding))
    return [quantizer for quantizer in found if quantizer not in REPRESENTATIVES]


QUANTIZERS = (*REPRESENTATIVES, *(pytest.param(quantizer, marks=pytest.mark.slow) for quantizer in _every()))


# Every training method by name, as a function of its grid. Loss terms: 16 rows of 4 outputs; schedules end within four steps.
ANNEALED, TERMS = 4, 64
METHODS: dict[str, Callable[[Quantizer], Method]] = {
    "ste": sw.ste,
    "clipped ste": lambda q: sw.ste(q, clip=0.8),
    "lotion": lambda q: sw.lotion(q, loss_terms=TERMS),
    "lotion, scale frozen": lambda q: sw.lotion(q, loss_terms=TERMS, through_scale=False),
    "ste + lotion": lambda q: sw.lotion(q, loss_terms=TERMS, forward="nearest"),
    "coupled": lambda q: sw.coupled(q, loss_terms=TERMS),
    "coupled, nearest": lambda q: sw.coupled(q, loss_terms=TERMS, nearest=True),
    "sampled": sw.sampled,
    "prox": lambda q: sw.prox(q, strength=exponential(1, 1e9, steps=ANNEALED), loss_terms=TERMS),
    "ste + prox": lambda q: sw.prox(q, strength=exponential(1, 1e9, steps=ANNEALED), loss_terms=TERMS, forward="nearest"),
    "own curvature": lambda q: sw.fisher(sw.lotion(q, loss_terms=TERMS)),
    "own curvature, prox": lambda q: sw.fisher(sw.prox(q, strength=exponential(1, 1e9, steps=ANNEALED), loss_terms=TERMS)),
    "parq": lambda q: sw.parq(q, slope=sigmoid(1, 0, steps=ANNEALED)),
    "binary relax": lambda q: sw.binary_relax(q, share=linear(0, 1, steps=ANNEALED)),
    "soft": lambda q: sw.soft(q, temperature=linear(0.5, 0, steps=ANNEALED)),
    "cage": lambda q: sw.cage(q, pull=linear(0, 10, begin=1, steps=ANNEALED - 1)),
    "held scales": lambda q: sw.held(sw.ste(q)),
    "held scales, lotion": lambda q: sw.held(sw.lotion(q, loss_terms=TERMS, forward="nearest")),
    "lsq": sw.lsq,
    "learned scales, parq": lambda q: sw.learned(sw.parq(q, slope=sigmoid(1, 0, steps=ANNEALED))),
    "carried weights": lambda q: sw.learned(sw.lotion(q, loss_terms=TERMS, forward="nearest"), rate=0.02, carry=True),
    "learned scales, latent": lambda q: sw.learned(sw.lotion(q, loss_terms=TERMS)),
    "faster": lambda q: sw.faster(sw.lotion(q, loss_terms=TERMS, forward="nearest"), 2.0),
    "default": lambda q: recipe(q, steps=ANNEALED, loss_terms=TERMS),
}
OWN_SCALES = (  # none with zero points
    "held scales", "held scales, lotion", "lsq", "learned scales, parq", "carried weights", "learned scales, latent"
)  # fmt: skip
ROUNDED = [
    name
    for name in METHODS
    if name not in ("lotion", "lotion, scale frozen", "coupled", "own curvature", "learned scales, latent", "sampled")
]

GRIDS = (
    intn(8, block=16), intn(4, block=32, levels="full"), intn(3, block="channel"), intn(2, block=16, levels="mid"), intn(2, block=None),
    ternary(block=16), fp4(), mxfp4(), nvfp4(), intn(3, block=16, levels="full", scale_dtype="fp16"),
    intn(4, levels="mid", scale_dtype="e8m0"), nvfp4(compute="bf16"),
)  # fmt: skip


@dataclass(frozen=True)
class Refit:
    """Whether quantizing twice with refitted scales changes nothing, and if not, why and how far a weight may move.

    Attributes:
        exact: bit for bit.
        steps: otherwise, the largest move in units of the largest gap between neighbours; None where no bound is derived.
        reason: why it is not exact.
    """

    exact: bool
    steps: float | None = None
    reason: str = ""


def refit(quantizer: Quantizer) -> Refit:
    """Return what the law of idempotence is for a quantizer that refits its scales on weights it has rounded.

    Refitting finds the same scale if the block's largest weight was rounded to the edge of the grid and the edge times the scale,
    divided by the edge, is the scale again. Narrow scales that are rounded up put that weight as low as `ratio * edge`.
    """
    format, dtype = quantizer.format, quantizer.scale_dtype
    if isinstance(quantizer.rule, float):
        return Refit(True)  # nothing is refitted
    if quantizer.compute is not None:
        return Refit(False, None, "`compute` rounds the largest weight, and the refitted scale with it")
    if format.levels == "affine":
        # The ends lie on codes up to half a step off the grid's ends (rounded zero point), so the refitted range is at most one step
        # shorter or, after float rounding, an ulp different. Absmax: inside it a weight moves half a step, at its ends another half.
        return Refit(
            False, 1.001 if quantizer.rule == "absmax" and dtype in ("fp32", "fp16") else None, "rounded zero points move the ends"
        )
    if dtype == "e8m0":
        # In the worst case the scale halves on refitting; grids closed under doubling then hold the same values. "mid" grids are not.
        return Refit(False, 1.0, "half-odd values are not closed under doubling") if format.levels == "mid" else Refit(True)
    # the largest weight in grid units is at least edge * ratio: e4m3 has 4 significant bits, so 8/9 rounding up and 16/17 to nearest
    ratio = 1.0 if dtype != "e4m3" else 16 / 17 if quantizer.scale_rounding == "nearest" else 8 / 9
    below = format.high if format.levels == "full" else format.values[-2]  # "full": the edge is -low and its neighbour one step nearer zero
    if format.edge * ratio < (format.edge + below) / 2:
        return Refit(False, 1.0 if quantizer.rule == "absmax" else None, "the largest weight may be rounded to below the edge")
    return Refit(True)


def gaussian(rows: int, cols: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal weights `(rows, cols)`."""
    return torch.randn(rows, cols, generator=seeded(seed), dtype=torch.float64).to(dtype)


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)


def widest(format: Format) -> float:
    """Return the largest gap between neighbouring values."""
    return max(upper - lower for lower, upper in zip(format.values, format.values[1:], strict=False))
