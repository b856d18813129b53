"""Heat map: a number over a rectangle of places, in bands on both sides of a limit, as a shore on a map."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch

from stepwell.report.canvas import INK, INSIDE, OUTSIDE, PAPER, canvas, styled, svg
from stepwell.report.figures import Axis, dress

_COLOURS = (*INSIDE, *OUTSIDE)


@dataclass(frozen=True)
class Mark:
    """A named place on the map."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class HeatMap:
    """Numbers over a rectangle.

    Args:
        x, y: positions of the columns and rows, rising.
        values: `values[i][j]` at `y[i]` and `x[j]`; infinite ones fall in the last band.
        limits: five upper ends of the first five bands, rising; the second is the limit between inside and outside.
        names: of the six bands, for the legend.
        marks: places to point out.
    """

    x: Sequence[float]
    y: Sequence[float]
    values: Sequence[Sequence[float]]
    limits: Sequence[float]
    names: Sequence[str]
    marks: Sequence[Mark] = ()

    def __post_init__(self) -> None:
        if len(self.limits) != len(_COLOURS) - 1 or len(self.names) != len(_COLOURS) or list(self.limits) != sorted(self.limits):
            raise ValueError(f"`limits` must be five rising numbers for six `names`: got {list(self.limits)} for {list(self.names)}.")


def draw_heat(heat: HeatMap, *, x: Axis, y: Axis, label: str, width: float = 5.4, height: float = 4.6) -> str:
    """Draw a heat map as one SVG element; only bands that occur are in the legend.

    Args:
        heat: what to draw.
        x, y: the axes.
        label: what the drawing shows, read by screen readers.
        width, height: in inches.
    """
    bands = [[bisect_left(heat.limits, value) for value in row] for row in heat.values]
    with styled():
        drawing = canvas(width, height)
        axes = drawing.add_subplot(facecolor=PAPER)
        norm = BoundaryNorm([k - 0.5 for k in range(len(_COLOURS) + 1)], len(_COLOURS))
        axes.pcolormesh(heat.x, heat.y, bands, cmap=ListedColormap(_COLOURS), norm=norm, shading="nearest", linewidth=0)
        for mark in heat.marks:
            axes.plot(mark.x, mark.y, marker="o", color=INK, markeredgecolor=PAPER, markersize=8, linestyle="none")
            axes.annotate(
                mark.name,
                (mark.x, mark.y),
                xytext=(6, 6),
                textcoords="offset points",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": "none"},
            )
        axes.grid(visible=False)
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        dress(axes, x, vertical=False)
        dress(axes, y, vertical=True)
        seen = sorted({band for row in bands for band in row})
        drawing.legend(handles=[Patch(facecolor=_COLOURS[k], label=heat.names[k]) for k in seen], loc="outside upper left", ncols=3)
        return svg(drawing, label)
