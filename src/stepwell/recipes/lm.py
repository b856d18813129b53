"""Language models: `stepwell train recipes.lm:NAME`, with names put together from a grid, a size and a method.

    int4_150m             the default, `quantize_training`'s method, on INT4
    int4_150m_lotion      LOTION; also _ste, _both (STE forward, LOTION's penalty), _prox
    fp_150m               full precision, to round afterwards or to start from
    int4_150m_cooldown    a tenth of the steps from a finished model (`--start`), the rate falling to zero; also _lotion_cooldown, ..
    int4_150m_olmo2       OLMo 2's blocks in place of Llama's; before _cooldown

`names()` lists all of them; each is a function without arguments. Budgets are 20 tokens per parameter but for the two small sizes, which a
CPU trains; sizes follow Kwun et al., "LOTION" (arXiv:2510.08757), whose rates and batches are not known: these are ours.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

from stepwell.methods.base import Method
from stepwell.methods.lotion import lotion
from stepwell.methods.prox import prox
from stepwell.methods.ste import ste
from stepwell.presets import int2, int3, int4, int8, nvfp4
from stepwell.quantizers import Quantizer
from stepwell.schedules import exponential
from stepwell.train.quantize import recipe as default
from stepwell.train.recipe import Architecture, Builder, Recipe

FULL_PRECISION, COOLDOWN = "fp", "cooldown"
OLMO: Literal["olmo2"] = "olmo2"
GRIDS: dict[str, Callable[[], Quantizer]] = {"int8": int8, "int4": int4, "int3": int3, "int2": int2, "fp4": nvfp4}
COOLED = 10  # a cooldown takes one step for ten of a run from scratch
WEAKEST, STRONGEST = 0.1, 1e3  # of prox: weights are free at the first and on the grid at the last


def _size(family_free: Architecture, *, steps: int, rows: int, length: int, micro: int, lr: float, precision: str, often: int) -> Recipe:
    """Return the full-precision run of one size."""
    return Recipe(
        name=FULL_PRECISION,
        architecture=family_free,
        quantizer=int4(),
        method=None,
        steps=steps,
        rows=rows,
        length=length,
        micro=micro,
        lr=lr,
        warmup=max(1, steps // 50),
        precision="bf16" if precision == "bf16" else "fp32",
        evaluate_every=often,
        save_every=often,
    )


def _sizes() -> dict[str, Recipe]:
    """Return the full-precision run of every size: 1.3, 15.4, 149 and 298 million parameters."""
    return {
        "1m": _size(
            Architecture("llama", width=128, layers=6, heads=4, hidden=352, vocabulary=1024, tied=True),
            steps=200, rows=16, length=64, micro=16, lr=3e-3, precision="fp32", often=50,
        ),
        "15m": _size(
            Architecture("llama", width=256, layers=14, heads=8, hidden=704, vocabulary=8192, tied=False),
            steps=20_000, rows=16, length=256, micro=16, lr=2e-3, precision="bf16", often=500,
        ),
        "150m": _size(
            Architecture("llama", width=768, layers=14, heads=12, hidden=2048, vocabulary=32_768, tied=False),
            steps=11_400, rows=256, length=1024, micro=16, lr=1e-3, precision="bf16", often=500,
        ),
        "300m": _size(
            Architecture("llama", width=1024, layers=18, heads=16, hidden=2816, vocabulary=32_768, tied=False),
            steps=11_400, rows=512, length=1024, micro=8, lr=6e-4, precision="bf16", often=500,
        ),
    }  # fmt: skip


def _ste(quantizer: Quantizer, steps: int, loss_terms: int) -> Method:
    """STE needs neither the length of the run nor loss terms."""
    del steps, loss_terms
    return ste(quantizer)


def _lotion(quantizer: Quantizer, steps: int, loss_terms: int) -> Method:
    """LOTION at the strength of its theory, the scale differentiated."""
    del steps
    return lotion(quantizer, loss_terms=loss_terms)


def _both(quantizer: Quantizer, steps: int, loss_terms: int) -> Method:
    """STE forward and backward, with LOTION's penalty on the latent weights."""
    del steps
    return lotion(quantizer, loss_terms=loss_terms, forward="nearest")


def _prox(quantizer: Quantizer, steps: int, loss_terms: int) -> Method:
    """STE with the proximal step, which grows until every weight lies on the grid."""
    return prox(quantizer, strength=exponential(WEAKEST, STRONGEST, steps=steps), loss_terms=loss_terms, forward="nearest")


def _default(quantizer: Quantizer, steps: int, loss_terms: int) -> Method:
    """What `quantize_training` attaches."""
    return default(quantizer, steps=steps, loss_terms=loss_terms)


METHODS: dict[str, Builder] = {"": _default, "ste": _ste, "lotion": _lotion, "both": _both, "prox": _prox}


def names() -> list[str]:
    """Return the name of every recipe here."""
    sizes, tails = list(_sizes()), ["_".join(filter(None, pair)) for pair in product(("", OLMO), ("", COOLDOWN))]
    heads = [f"{FULL_PRECISION}_{size}" for size in sizes]
    heads += ["_".join(filter(None, parts)) for parts in product(GRIDS, sizes, METHODS)]
    return ["_".join(filter(None, pair)) for pair in product(heads, tails)]


def known() -> str:
    """Return the names of all recipes in one sentence."""
    methods = ", ".join(f"_{method}" for method in METHODS if method)
    return (
        f"GRID_SIZE with a grid of {', '.join([FULL_PRECISION, *GRIDS])} and a size of {', '.join(_sizes())}, then nothing or one of "
        f"{methods} (not after {FULL_PRECISION}), then nothing or _{OLMO}, then nothing or _{COOLDOWN}: such as int4_15m_lotion_{COOLDOWN}"
    )


def _recipe(name: str) -> Recipe:
    """Put a recipe together from its name, which is one of `names()`."""
    grid, size, *rest = name.split("_")
    made = replace(_sizes()[size], name=name)
    if OLMO in rest:
        made = replace(made, architecture=made.architecture._replace(family=OLMO))
    if COOLDOWN in rest:
        made = replace(made, steps=made.steps // COOLED, warmup=0, decay="linear", cooldown=True)
    if grid == FULL_PRECISION:
        return made
    method = next((word for word in rest if word in METHODS), "")
    return replace(made, quantizer=GRIDS[grid](), method=METHODS[method])


def __getattr__(name: str) -> Callable[[], Recipe]:
    """Return the function that makes a recipe.

    Raises:
        AttributeError: no recipe of that name.
    """
    if name.startswith("__") or name not in names():
        raise AttributeError(f"stepwell.recipes.lm has no recipe {name!r}. Known: {known()}.")
    return partial(_recipe, name)


def __dir__() -> list[str]:
    return sorted([*names(), "known", "names"])
