"""Train, explain, predict and ship quantized neural networks, on the exact grid the runtime will use.

Public names load on first use, so that `stepwell predict` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it; a module maps to itself
_HOME = {
    **dict.fromkeys(("intn", "int2", "int3", "int4", "int8", "ternary", "fp4", "fp8", "mxfp4", "nvfp4"), "stepwell.presets"),
    **dict.fromkeys(("target", "targets"), "stepwell.runtimes"),
    **dict.fromkeys(("Quantizer", "Encoded"), "stepwell.quantizers"),
    **dict.fromkeys(("Bracket", "nearest", "stochastic", "variance"), "stepwell.rounding"),
    **dict.fromkeys(("save", "load"), "stepwell.storage"),
    **dict.fromkeys(("select",), "stepwell.selection"),
    **dict.fromkeys(("attach", "Run"), "stepwell.run.attach"),
    "quantize_activations": "stepwell.activations",
    "ste": "stepwell.methods.ste",
    "lotion": "stepwell.methods.lotion",
    "lsq": "stepwell.methods.lsq",
    "parq": "stepwell.methods.parq",
    **dict.fromkeys(("held", "learned"), "stepwell.methods.learned"),
    **{name: f"stepwell.methods.{name}" for name in ("binary_relax", "cage", "coupled", "faster", "fisher", "prox", "sampled", "soft")},
    "distillation": "stepwell.methods.distill",
    "gauss_newton": "stepwell.run.gauss_newton",
    "quantize_training": "stepwell.train.quantize",
    "verify": "stepwell.export.parity",
    "advise": "stepwell.advice.advise",
    "bits_per_layer": "stepwell.advice.bits",
    "Testbed": "stepwell.testbed",
    **{name: f"stepwell.{name}" for name in ("ptq", "probes", "theory", "export", "methods", "optim", "schedules", "explain")},
}

if TYPE_CHECKING:
    from stepwell import explain, export, methods, optim, probes, ptq, schedules, theory
    from stepwell.activations import quantize_activations
    from stepwell.advice.advise import advise
    from stepwell.advice.bits import bits_per_layer
    from stepwell.export.parity import verify
    from stepwell.methods.binary_relax import binary_relax
    from stepwell.methods.cage import cage
    from stepwell.methods.coupled import coupled
    from stepwell.methods.distill import distillation
    from stepwell.methods.faster import faster
    from stepwell.methods.fisher import fisher
    from stepwell.methods.learned import held, learned
    from stepwell.methods.lotion import lotion
    from stepwell.methods.lsq import lsq
    from stepwell.methods.parq import parq
    from stepwell.methods.prox import prox
    from stepwell.methods.sampled import sampled
    from stepwell.methods.soft import soft
    from stepwell.methods.ste import ste
    from stepwell.presets import fp4, fp8, int2, int3, int4, int8, intn, mxfp4, nvfp4, ternary
    from stepwell.quantizers import Encoded, Quantizer
    from stepwell.rounding import Bracket, nearest, stochastic, variance
    from stepwell.run.attach import Run, attach
    from stepwell.run.gauss_newton import gauss_newton
    from stepwell.runtimes import target, targets
    from stepwell.selection import select
    from stepwell.storage import load, save
    from stepwell.testbed import Testbed
    from stepwell.train.quantize import quantize_training

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"stepwell has no {name!r}. Public names: {', '.join(sorted(_HOME))}.")
    home = import_module(_HOME[name])
    # a module of the same name is the public thing itself
    value = home if _HOME[name] == f"stepwell.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
