"""Theory: learning curves of quantized training without training, in closed form or from one small equation.

Everything here is numpy and scipy; numba, where installed, compiles the inner loops. Nothing imports torch. The solvers are loaded
at once, because functions and their modules share names; the basin toy on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepwell.theory.closure import closure
from stepwell.theory.deviation import high_resolution, low_noise, rounded
from stepwell.theory.exact import exact
from stepwell.theory.linear import ptq, unquantized
from stepwell.theory.plateau import Estimate, estimate, plateau
from stepwell.theory.problem import Problem
from stepwell.theory.ranges import BestRange, Sweep, best_range, sweep
from stepwell.theory.simulate import Sample, simulate, simulate_weights
from stepwell.theory.stability import Stability, stability
from stepwell.theory.staircase import Staircase
from stepwell.theory.stationary import stationary
from stepwell.theory.trajectory import Density, Plateau, Stationary, Trajectory

if TYPE_CHECKING:
    from stepwell.theory.valley import Valley

# name -> module that defines it; loaded on first use
_HOME = {"Valley": "stepwell.theory.valley"}

__all__ = [
    "BestRange",
    "Density",
    "Estimate",
    "Plateau",
    "Problem",
    "Sample",
    "Stability",
    "Staircase",
    "Stationary",
    "Sweep",
    "Trajectory",
    "Valley",
    "best_range",
    "closure",
    "estimate",
    "exact",
    "high_resolution",
    "low_noise",
    "plateau",
    "ptq",
    "rounded",
    "simulate",
    "simulate_weights",
    "stability",
    "stationary",
    "sweep",
    "unquantized",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"stepwell.theory has no {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
