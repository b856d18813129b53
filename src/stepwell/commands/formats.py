"""`stepwell formats`: every grid of element values, with its range and a drawing."""

from itertools import pairwise

from stepwell.commands.output import Json, console, print_json, print_table

RULER = 43  # characters at most: 42 gaps, which the grids of 3, 7, 8 and 15 values divide evenly
OTHER_COLUMNS = 71


def formats(*, json: Json = False) -> None:
    """List the element formats: bits, values, range, smallest step, and the grid drawn to scale."""
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


def ruler(values: tuple[float, ...], width: int) -> str:
    """Return a grid drawn to scale, `width` characters from its lowest to its highest value.

    >>> ruler((-1.0, 0.0, 0.1, 1.0), 9)
    '|...#...|'
    """
    counts = [0] * width
    for value in values:
        counts[round((value - values[0]) / (values[-1] - values[0]) * (width - 1))] += 1
    return "".join(".|#"[min(count, 2)] for count in counts)
