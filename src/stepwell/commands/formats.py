"""`stepwell formats`: every grid of element values, with its range and a drawing; or the grids of the runtimes."""

from itertools import pairwise
from typing import Annotated

import typer

from stepwell.commands.output import Json, console, print_json, print_table

RULER = 43  # characters at most: 42 gaps, which the grids of 3, 7, 8 and 15 values divide evenly
OTHER_COLUMNS = 71


def formats(
    *, targets: Annotated[bool, typer.Option("--targets", help="List what runtimes hold instead.")] = False, json: Json = False
) -> None:
    """List the element formats: bits, values, range, smallest step, and the grid drawn to scale."""
    if targets:
        list_targets(json=json)
        return
    from stepwell.formats import formats as known

    width = max(9, min(RULER, console().width - OTHER_COLUMNS))
    rows = [
        {
            "name": format.name,
            "levels": format.levels or "float",
            "bits": format.bits,
            "values": len(format.values),
            "lowest": format.low,
            "highest": format.high,
            "step": min(b - a for a, b in pairwise(format.values)),
            **({} if json else {"grid": ruler(format.values, width)}),
        }
        for format in known()
    ]
    if json:
        print_json(rows)
    else:
        print_table(
            rows, title="Element formats, in units of the scale", note="step: the smallest; grid: drawn to scale, | one value, # several"
        )


def list_targets(*, json: bool) -> None:
    """List the grids of runtimes: what `sw.target` takes, its default grid, and what else the runtime holds."""
    from stepwell.runtimes import targets

    rows: list[dict[str, object]] = [
        {
            "target": target.name,
            "grid": str(target.quantizer),
            "bits": ", ".join(map(str, target.bits)),
            "blocks": ", ".join("tensor" if block is None else str(block) for block in target.blocks),
            **({"note": target.note} if json else {}),
        }
        for target in targets()
    ]
    if json:
        print_json(rows)
    else:
        print_table(
            rows,
            title="Grids of runtimes, for sw.target(..) and stepwell quantize --target",
            note="The first block is the default; --json says more.",
        )


def ruler(values: tuple[float, ...], width: int) -> str:
    """Return a grid drawn to scale, `width` characters from its lowest to its highest value.

    >>> ruler((-1.0, 0.0, 0.1, 1.0), 9)
    '|...#...|'
    """
    counts = [0] * width
    for value in values:
        counts[round((value - values[0]) / (values[-1] - values[0]) * (width - 1))] += 1
    return "".join(".|#"[min(count, 2)] for count in counts)
