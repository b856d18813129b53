"""The page: records that hold its content, and the function that renders them as one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jinja2
from markupsafe import Markup

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns; a column name carries its unit in brackets.

    Args:
        columns: names, for instance `"loss (nats)"`.
        rows: one cell per column; numbers are right-aligned, floats shown with four significant digits, None as a dash.
        caption: what the table holds, one sentence or empty.
        strong: indices of rows to emphasise.
        grouped: rule a line wherever the first cell changes.
        folded: behind a fold whose handle is the caption; figures fold their tables anyway.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    strong: Sequence[int] = ()
    grouped: bool = False
    folded: bool = False

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"`rows` must have {len(self.columns)} cells each: row {index} has {len(row)}. Add or remove cells.")

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, and nothing else but missing ones."""
        columns = [[cell for cell in column if cell is not None] for column in zip(*self.rows, strict=True)] or [[] for _ in self.columns]
        return [bool(column) and all(isinstance(cell, int | float) for cell in column) for column in columns]


@dataclass(frozen=True)
class Figure:
    """A drawing, the one sentence that says what it means, and the numbers it shows."""

    title: str
    svg: str
    meaning: str
    table: Table


@dataclass(frozen=True)
class Finding:
    """A headline: a short value in large type, and a sentence; `state` says whether it is what one hoped for."""

    value: str
    text: str
    state: Literal["plain", "good", "bad"] = "plain"


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, figures (side by side where there is room) and tables."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """Everything on the page, from top to bottom; `facts` are name and value of the run (versions, machine, seeds, ...)."""

    title: str
    lead: str
    findings: Sequence[Finding]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()


def render(page: Page) -> str:
    """Return the page as one HTML document that needs no other file and no network.

    Args:
        page: content; all text is escaped, the drawings (`Figure.svg`) are inserted as they are.
    """
    here = files("stepwell.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = shown
    template = environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    drawings = [[Markup(figure.svg) for figure in section.figures] for section in page.sections]
    theme = Markup(here.joinpath("theme.css").read_text(encoding="utf-8"))
    return template.render(page=page, drawings=drawings, theme=theme)


def write(page: Page, path: Path) -> Path:
    """Write the rendered page to `path`, making its folder where needed, and return the absolute path."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page), encoding="utf-8")
    return path


def shown(cell: Cell) -> str:
    """Return a table cell as text: floats with four significant digits, None as a dash.

    >>> [shown(cell) for cell in (0.123456, 12, None, "int4", 3.2e-7)]
    ['0.1235', '12', '–', 'int4', '3.2e-07']
    """
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
