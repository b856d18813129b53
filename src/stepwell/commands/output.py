"""What every command prints: a table for people, JSON for machines."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]

PIPED_WIDTH = 120


def console() -> Console:
    """Return the console for standard output; wide enough for a table where no terminal says how wide it is."""
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=PIPED_WIDTH)


def print_json(value: object) -> None:
    """Print a value as JSON; numbers that are not finite become null, arrays and tuples become lists."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(rows: Sequence[Mapping[str, object]], *, title: str, note: str = "") -> None:
    """Print records that share their keys as a table.

    Args:
        rows: one mapping per line; the keys of the first are the columns, an underscore standing for a space.
        title: above the table.
        note: a sentence below it.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for key in rows[0] if rows else {}:
        numeric = all(isinstance(row[key], int | float) for row in rows)
        table.add_column(key.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    parts = (title, table if rows else "", note)
    console().print(*(part for part in parts if part), sep="\n", highlight=False)


def plain(value: object) -> Any:
    """Return a value made of what JSON knows.

    >>> plain({"error": (1.0, float("nan"))})
    {'error': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a scalar of numpy or torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cell(value: object) -> str:
    """Return how a value stands in a table: five digits, no trailing zeros."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return " x ".join(str(item) for item in value)
    return str(value)
