"""Drawings of series over axes, as SVG whose colours follow the reader's light or dark mode."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stepwell.report.canvas import PAPER, SERIES, canvas, styled, svg

_MARKERS = ("", "s", "^", "o", "D", "v")


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
    with styled():
        drawing = canvas(width * len(panels), height)
        first: Axes | None = None
        for index, panel in enumerate(panels):
            axes = drawing.add_subplot(1, len(panels), index + 1, sharey=first, facecolor=PAPER)
            _panel(axes, panel, with_label=index == 0)
            first = first or axes
        assert first is not None
        handles, names = first.get_legend_handles_labels()
        if handles:
            columns = len(names) if len(names) <= 3 * len(panels) else (len(names) + 1) // 2
            drawing.legend(handles, names, loc="outside upper left", ncols=columns)
        return svg(drawing, label)


def standalone(drawing: str) -> str:
    """Return the drawing as an SVG file of its own, with the two palettes inside."""
    theme = files("stepwell.report").joinpath("theme.css").read_text(encoding="utf-8")
    head, _, rest = drawing.partition(">")
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
        dress(axes, axis, vertical=vertical)


def _series(axes: Axes, series: Series) -> None:
    """Draw one series in its colour and marker."""
    colour = SERIES[series.colour]
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
        markerfacecolor=PAPER if series.hollow else colour,
        capsize=2.5,
        elinewidth=1.2,
        label=series.name or None,
    )


def dress(axes: Axes, axis: Axis, *, vertical: bool) -> None:
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
