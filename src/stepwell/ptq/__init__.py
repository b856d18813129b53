"""Rounding without training: one rule per file. Those that take a model write the grid weights in place and return them encoded."""

from stepwell.ptq.exact_scale import exact_scale
from stepwell.ptq.gptq import gptq
from stepwell.ptq.rtn import rtn
from stepwell.ptq.scale_search import scale_search

__all__ = ["exact_scale", "gptq", "rtn", "scale_search"]
