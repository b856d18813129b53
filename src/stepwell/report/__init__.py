"""One self-contained HTML page for people: findings first, figures with their data, tables; works offline.

Imports no other part of the library: callers hand over plain strings, numbers and sequences.
"""

from stepwell.report.bars import Bars, draw_bars
from stepwell.report.figures import Axis, Panel, Series, draw, standalone
from stepwell.report.heatmap import HeatMap, Mark, draw_heat
from stepwell.report.page import Figure, Finding, Page, Section, Table, render, write

__all__ = [
    "Axis",
    "Bars",
    "Figure",
    "Finding",
    "HeatMap",
    "Mark",
    "Page",
    "Panel",
    "Section",
    "Series",
    "Table",
    "draw",
    "draw_bars",
    "draw_heat",
    "render",
    "standalone",
    "write",
]
