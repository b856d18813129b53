"""Result tables that grow configuration by configuration, so that a long campaign can stop and go on. Running it does nothing."""

from collections.abc import Sequence

from shared import RESULTS, read, write

KEY = ("network", "scheme", "bits")
Row = dict[str, object]


def has(name: str, configuration: Sequence[object]) -> list[dict[str, str]]:
    """Return the rows of a configuration in a table of results/."""
    wanted = tuple(map(str, configuration))
    held = read(name) if (RESULTS / name).exists() else []
    return [row for row in held if tuple(row[column] for column in KEY[: len(wanted)]) == wanted]


def replace(name: str, configuration: Sequence[object], rows: Sequence[Row], order: Sequence[str]) -> None:
    """Write the rows of a configuration in place of those that a table of results/ had; networks stay in the order of `order`."""
    if not rows:
        return
    wanted = tuple(map(str, configuration))
    header = list(rows[0])
    held = read(name) if (RESULTS / name).exists() else []
    kept: list[dict[str, object]] = [dict(row) for row in held if tuple(row[column] for column in KEY[: len(wanted)]) != wanted]
    together = sorted([*kept, *rows], key=lambda row: order.index(str(row["network"])))
    write(name, header, [[row.get(column) for column in header] for row in together])
