"""Drawings as SVG whose colours follow the reader's light or dark mode.

matplotlib draws with placeholder colours; each placeholder becomes a CSS variable of `theme.css`. Text stays text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import count
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Placeholder colour -> CSS variable. Series 0 is neutral (a reference line), 1 to 5 are told apart by colour and marker.
_INK, _MUTED, _RULE, _PAPER = "#fe1000", "#fe2000", "#fe3000", "#fe4000"
_SERIES = tuple(f"#fe000{index}" for index in range(6))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _PAPER: "paper"} | {c: f"series-{i}" for i, c in enumerate(_SERIES)}
_MARKERS = ("", "s", "^", "o", "D", "v")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stepwell",  # the same drawing has the same ids every time
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.4,
}


@dataclass(frozen=True)
class Axis:
    """One axis: its label with the unit, its scale, and optionally named ticks `((position, text), ...)` and limits."""

    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    limits: tuple[float, float] | None = None
    percent: bool = False


@dataclass(frozen=True)
class Series:
    """One set of points.

    Args:
        name: legend text; empty keeps it out of the legend.
        x, y: coordinates, equally long.
        spread: half length of the error bars, in units of y (None: none).
        colour: 0 (neutral) to 5.
        style: joined by lines, points only, or a staircase (histograms).
        hollow: draw the markers unfilled.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    colour: int = 0
    style: Literal["line", "points", "steps", "dashed"] = "line"
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its series."""

    series: Sequence[Series]
    x: Axis
    y: Axis
    title: str = ""


def draw(panels: Sequence[Panel], *, label: str, width: float = 5.4, height: float = 3.7) -> str:
    """Draw panels side by side (sharing the vertical axis) as one SVG element.

    Args:
        panels: at least one; the legend is taken from the first.
        label: what the drawing shows, read by screen readers.
        width: of one panel, in inches.
        height: in inches.

    Returns:
        `<svg ...>...</svg>`; its colours are CSS variables, its ids are unique within one process.
    """
    if not panels:
        raise ValueError("`panels` must hold at least one panel: got none. Pass `[Panel(series, x, y)]`.")
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(width * len(panels), height), facecolor=_PAPER, layout="constrained")
        first: Axes | None = None
        for index, panel in enumerate(panels):
            axes = canvas.add_subplot(1, len(panels), index + 1, sharey=first, facecolor=_PAPER)
            _panel(axes, panel, with_label=index == 0)
            first = first or axes
        assert first is not None
        handles, names = first.get_legend_handles_labels()
        if handles:
            columns = len(names) if len(names) <= 3 * len(panels) else (len(names) + 1) // 2
            canvas.legend(handles, names, loc="outside upper left", ncols=columns)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(buffer.getvalue(), label)


def standalone(svg: str) -> str:
    """Return the drawing as an SVG file of its own, with the two palettes inside."""
    theme = files("stepwell.report").joinpath("theme.css").read_text(encoding="utf-8")
    head, _, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n<style>{theme}</style>{rest}\n'


def _panel(axes: Axes, panel: Panel, *, with_label: bool) -> None:
    """Draw one panel's series and dress its axes."""
    for series in panel.series:
        _series(axes, series)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x.label)
    if with_label:
        axes.set_ylabel(panel.y.label)
    else:
        axes.tick_params(labelleft=False)
    for axis, vertical in ((panel.x, False), (panel.y, True)):
        _dress(axes, axis, vertical=vertical)


def _series(axes: Axes, series: Series) -> None:
    """Draw one series in its colour and marker."""
    colour = _SERIES[series.colour]
    if series.style == "steps":
        axes.step(series.x, series.y, where="mid", color=colour, linewidth=1.8, label=series.name or None)
        return
    line = {"line": "-", "dashed": "--", "points": "none"}[series.style]
    axes.errorbar(
        series.x,
        series.y,
        yerr=series.spread,
        color=colour,
        linestyle=line,
        linewidth=1.7,
        marker=_MARKERS[series.colour] if series.style != "dashed" else "",
        markersize=6,
        markerfacecolor=_PAPER if series.hollow else colour,
        capsize=2.5,
        elinewidth=1.2,
        label=series.name or None,
    )


def _dress(axes: Axes, axis: Axis, *, vertical: bool) -> None:
    """Set scale, limits and ticks; logarithmic axes show plain numbers."""
    side = axes.yaxis if vertical else axes.xaxis
    if axis.log:
        (axes.set_yscale if vertical else axes.set_xscale)("log")
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())
    if axis.percent:
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    if axis.limits:
        (axes.set_ylim if vertical else axes.set_xlim)(*axis.limits)
    if axis.ticks:
        side.set_ticks([position for position, _ in axis.ticks], labels=[text for _, text in axis.ticks])


_numbers = count(1)


def _themed(svg: str, label: str) -> str:
    """Strip what only a file needs, make ids unique, replace placeholder colours by CSS variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"f{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
