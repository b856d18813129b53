"""Why rounding fails on a model, what is near, and which method will reach it: the measurement behind `stepwell explain`."""

from stepwell.explain.effort import FULL, NORMAL, QUICK, Effort, planned
from stepwell.explain.measure import measure, scheme
from stepwell.explain.records import Explanation

__all__ = ["FULL", "NORMAL", "QUICK", "Effort", "Explanation", "measure", "planned", "scheme"]
