"""The page: self-contained, complete, escaped; drawings that follow the reader's colours."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from stepwell.report import Axis, Figure, Finding, Page, Panel, Section, Series, Table, draw, render, standalone, write
from stepwell.report.page import shown

X, Y = Axis("bits per weight", ticks=((0, "4"), (1, "2"))), Axis("loss (nats per image)", log=True)
VOID = {"meta", "br", "link", "img", "input", "hr"}


def drawing(label="loss against bits"):
    return draw([Panel([Series("RTN", [0, 1], [0.1, 1.5], spread=[0.01, 0.2], colour=1)], X, Y)], label=label)


def example():
    table = Table(["method", "loss (nats)"], [["RTN", 0.123456], ["STE <&>", None]], "All of it.", [0])
    figure = Figure("Loss", drawing(), "Fewer bits lose more.", table)
    return Page(
        "A title", "A lead.", [Finding("98 %", "found", "good")], [Section("One", ["Text."], [figure, figure], [table])], [("seeds", "3")]
    )


class Reader(HTMLParser):
    """Collects tags, ids, references and text, and checks that tags nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.inside, self.text = [], [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.inside += [named[key][1:] for key in ("href", "xlink:href") if str(named.get(key, "")).startswith("#")]
        self.loads += [named[key] for key in ("src", "href", "xlink:href", "srcset") if key in named and not named[key].startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_page_needs_no_other_file_and_no_network():
    text = render(example())
    reader = read(text)
    assert reader.loads == []
    assert not {"script", "link", "iframe", "img"} & set(reader.tags)
    outside = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of XML languages: nothing is fetched
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_tags_nest_and_ids_are_unique_and_found():
    reader = read(render(example()))
    assert reader.open == []
    second = read(drawing() + drawing())  # twice the same drawing on one page
    assert len(second.ids) == len(set(second.ids))
    assert second.inside
    assert set(second.inside) <= set(second.ids)


def test_every_figure_has_its_sentence_its_axes_and_its_numbers_behind_a_fold():
    reader = read(render(example()))
    text = "".join(reader.text)
    assert reader.tags.count("figure") == reader.tags.count("figcaption") == reader.tags.count("details") == 2
    assert text.count("Fewer bits lose more.") == 2
    for label in (X.label, Y.label, "RTN", "0.1235", "–", "98 %", "A lead.", "All of it."):
        assert label in text


def test_a_folded_table_has_its_caption_as_handle():
    page = Page("t", "l", [], [Section("s", tables=[Table(["name", "why"], [["bias", "no matrix"]], "Left alone", folded=True)])])
    text = "".join(render(page).split("\n"))
    assert re.search(r"<details><summary>Left alone</summary>.*<td>no matrix</td>.*</details>", text)
    assert text.count("Left alone") == 1


def test_text_is_escaped():
    text = render(example())
    assert "STE &lt;&amp;&gt;" in text
    assert "STE <&>" not in text
    assert 'aria-label="a &lt;b&gt; &amp; &quot;c&quot;"' in drawing('a <b> & "c"')


def test_phone_and_dark_mode_have_their_rules():
    text = render(example())
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert "overflow-x: auto" in text  # wide tables scroll inside the page, not the page itself


def test_drawing_has_no_colour_of_its_own():
    """Every stroke, fill and text is a variable, so that it is legible on light and on dark paper."""
    panels = [
        Panel([Series("a", [0, 1], [0.1, 1], colour=k), Series("b", [0, 1], [0.2, 1], colour=k, style="steps")], X, Y, "t")
        for k in range(6)
    ]
    svg = draw(
        [*panels, Panel([Series("c", [0, 1], [0.1, 1], style="dashed"), Series("", [0], [1], style="points", hollow=True)], X, Y)],
        label="l",
    )
    assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
    theme = render(example())
    assert used == {"ink", "muted", "rule", "paper", *(f"series-{k}" for k in range(6))}
    assert all(len(re.findall(rf"--{name}:", theme)) == 2 for name in used)  # defined for light and for dark


def test_same_drawing_same_bytes_but_for_the_running_number():
    one, two = (re.sub(r"f\d+-", "", drawing()) for _ in range(2))
    assert one == two


def test_points_lie_where_the_numbers_say():
    """Three collinear points, equally spaced, stay so in the drawing; log axes space factors equally."""

    def markers(axis, y):
        svg = draw([Panel([Series("s", [0, 1, 2], y, style="points", colour=1)], X, axis)], label="l")
        tree = ElementTree.fromstring(svg)
        legendless = [use for use in tree.iter("{http://www.w3.org/2000/svg}use") if "series-1" in use.get("style", "")]
        return sorted((float(use.get("x")), float(use.get("y"))) for use in legendless)[-3:]

    for axis, y in ((Axis("linear (1)"), [1.0, 2.0, 3.0]), (Axis("log (1)", log=True), [0.1, 1.0, 10.0])):
        (x0, y0), (x1, y1), (x2, y2) = markers(axis, y)
        assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3)  # matplotlib writes six decimals
        assert y1 - y0 == pytest.approx(y2 - y1, abs=1e-3)
        assert y0 > y1  # SVG counts downwards


def test_standalone_drawing_is_xml_with_both_palettes():
    text = standalone(drawing())
    tree = ElementTree.fromstring(text.encode())
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert text.count("--series-1:") == 2
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)


def test_write_makes_the_folder_and_returns_the_absolute_path(tmp_path):
    path = write(example(), tmp_path / "a" / "b.html")
    assert path.is_absolute()
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(("cell", "text"), [(0.0, "0"), (1.5, "1.5"), (1e-7, "1e-07"), (123456.0, "1.235e+05"), (7, "7"), (None, "–")])
def test_cells_are_shown_briefly(cell, text):
    assert shown(cell) == text


def test_uneven_rows_and_empty_drawings_are_refused():
    with pytest.raises(ValueError, match=r"`rows` must have 2 cells each: row 1 has 1"):
        Table(["a", "b"], [[1, 2], [1]])
    with pytest.raises(ValueError, match="`panels` must hold at least one panel"):
        draw([], label="nothing")
