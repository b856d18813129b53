"""Bars and heat maps: lengths and bands are those of the numbers, colours are the page's, and what does not fit is refused."""

import math
import re
from xml.etree import ElementTree

import pytest

from stepwell.report import Axis, Bars, HeatMap, Mark, draw_bars, draw_heat, render
from stepwell.report.page import Page

X = Axis("loss increase (nats)")
NAMES = ("half", "limit", "twice", "five", "ten", "beyond")


def paths(svg, colour):
    """Every filled path of a colour, as a list of its corners; first the drawing's, last the legend's."""
    found = []
    for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        if f"fill: var(--{colour})" in node.get("style", ""):
            numbers = [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", node.get("d"))]
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def lengths(svg, colour):
    return [max(x for x, _ in path) - min(x for x, _ in path) for path in paths(svg, colour)]


def test_bars_are_as_long_as_the_numbers_say():
    svg = draw_bars(["a", "b", "c"], [Bars("alone", [0.4, 0.2, 0.1]), Bars("left out", [0.2, 0.1, -0.1], 2)], axis=X, label="l")
    one, two, three = lengths(svg, "series-1")[:3]
    assert (one / two, two / three) == pytest.approx((2, 2), rel=1e-4)
    assert lengths(svg, "series-2")[:3] == pytest.approx([two, three, three], rel=1e-4)
    tops = [min(y for _, y in path) for path in paths(svg, "series-1")[:3]]
    assert tops == sorted(tops)  # the first name on top: SVG counts downwards


def test_bars_name_the_limit_and_every_row():
    svg = draw_bars(["first layer", "second layer"], [Bars("alone", [1.0, 2.0])], axis=X, label="damage", limit=(1.5, "tolerance"))
    text = " ".join("".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))
    assert all(word in text for word in ("first layer", "second layer", "tolerance", X.label))
    assert 'aria-label="damage"' in svg


def grid(values, **other):
    return HeatMap(range(len(values[0])), range(len(values)), values, (0.05, 0.1, 0.2, 0.5, 1.0), NAMES, **other)


def test_heat_map_paints_every_place_in_its_band():
    values = [[0.0, 0.05, 0.06], [0.1, 0.11, 0.3], [0.7, 3.0, math.inf]]
    svg = draw_heat(grid(values), x=Axis("x"), y=Axis("y"), label="l")
    expected = {"inside-0": 2, "inside-1": 2, "outside-0": 1, "outside-1": 1, "outside-2": 1, "outside-3": 2}
    squares = {colour: len(paths(svg, colour)) - 1 for colour in expected}  # one more in the legend
    assert squares == expected


def test_heat_map_puts_the_first_row_below_and_names_its_marks():
    svg = draw_heat(grid([[0.0, 0.0], [9.0, 9.0]], marks=[Mark("start", 0, 0)]), x=Axis("x"), y=Axis("y"), label="l")
    low, high = (min(y for _, y in paths(svg, colour)[0]) for colour in ("inside-0", "outside-3"))
    assert low > high
    assert "start" in svg
    assert "half" in svg
    assert "twice" not in svg  # only bands that occur are in the legend


def test_maps_have_no_colour_of_their_own():
    svg = draw_bars(["a"], [Bars("b", [1.0])], axis=X, label="l") + draw_heat(
        grid([[0.0, 0.1, 0.2], [0.5, 1.0, 2.0]]), x=Axis("x"), y=Axis("y"), label="l"
    )
    assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
    theme = render(Page("t", "l", [], []))
    assert {f"outside-{k}" for k in range(4)} < used
    assert all(len(re.findall(rf"--{name}:", theme)) == 2 for name in used)  # defined for light and for dark


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`groups` must hold 2 values each"):
        draw_bars(["a", "b"], [Bars("x", [1.0])], axis=X, label="l")
    with pytest.raises(ValueError, match="`groups` must hold 0 values each, at least one"):
        draw_bars([], [], axis=X, label="l")
    with pytest.raises(ValueError, match="`limits` must be five rising numbers"):
        HeatMap([0], [0], [[1.0]], (1.0, 0.5, 2.0, 3.0, 4.0), NAMES)
