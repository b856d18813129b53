"""Rounding without training: one rule per file. Each function writes the grid weights in place and returns them encoded."""

from stepwell.ptq.rtn import rtn

__all__ = ["rtn"]
