"""Bars: named amounts from left to right, as a ranking is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from stepwell.report.canvas import INK, PAPER, SERIES, canvas, styled, svg
from stepwell.report.figures import Axis, dress

_THICKNESS, _HEADROOM = 0.3, 1.0  # inches: of one name's bars, and of what stands above and below them


@dataclass(frozen=True)
class Bars:
    """One amount for every name.

    Args:
        name: legend text.
        values: in the order of the names.
        colour: 0 (neutral) to 5.
    """

    name: str
    values: Sequence[float]
    colour: int = 1


def draw_bars(
    names: Sequence[str], groups: Sequence[Bars], *, axis: Axis, label: str, limit: tuple[float, str] | None = None, width: float = 5.4
) -> str:
    """Draw horizontal bars as one SVG element, the first name on top.

    Args:
        names: one per row.
        groups: one or more bars per row, from top to bottom.
        axis: of the amounts.
        label: what the drawing shows, read by screen readers.
        limit: an amount that is marked by a dashed line, and its legend text.
        width: in inches; the height follows from the number of rows.

    Raises:
        ValueError: no names, or a group with another number of values.
    """
    if not names or any(len(group.values) != len(names) for group in groups):
        raise ValueError(f"`groups` must hold {len(names)} values each, at least one: got {[len(group.values) for group in groups]}.")
    rows = range(len(names))
    with styled():
        drawing = canvas(width, _HEADROOM + _THICKNESS * len(names))
        axes = drawing.add_subplot(facecolor=PAPER)
        each = 0.8 / len(groups)
        for index, group in enumerate(groups):
            places = [row - 0.4 + each * (index + 0.5) for row in rows]
            axes.barh(places, group.values, height=0.9 * each, color=SERIES[group.colour], label=group.name)
        if limit is not None:
            axes.axvline(limit[0], color=INK, linestyle="--", linewidth=1.2, label=limit[1])
        axes.set_xlabel(axis.label)
        dress(axes, axis, vertical=False)
        axes.set_yticks(list(rows), labels=list(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        handles, words = axes.get_legend_handles_labels()
        if len(handles) > 1:
            order = sorted(range(len(words)), key=lambda k: limit is not None and words[k] == limit[1])  # the limit comes last
            drawing.legend([handles[k] for k in order], [words[k] for k in order], loc="outside upper left", ncols=2)
        return svg(drawing, label)
