"""What the files of this folder share: result tables that grow row by row, means with intervals, pictures. Running it does nothing."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
BLUE, BROWN, GREY, GREEN, RED, PURPLE = "#1f4e8c", "#b5651d", "#999999", "#3b7d4f", "#a63d40", "#6b4c9a"
Row = Mapping[str, object]


def write(name: str, rows: Sequence[Row]) -> None:
    """Write a table to results/, six digits; None is an empty field."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{key: field(value) for key, value in row.items()} for row in rows])


def field(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.6g}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table; none, with a message, where nobody has made it yet."""
    if not path.exists():
        print(f"skipped: {path.relative_to(ROOT)} is not there")
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Runs:
    """A table of single runs in results/, written after every one: a stopped campaign goes on where it was."""

    def __init__(self, name: str, key: Sequence[str]) -> None:
        self.path, self.key = RESULTS / name, key
        self.rows: list[dict[str, str]] = read(self.path) if self.path.exists() else []
        self._there = {tuple(row[column] for column in key) for row in self.rows}

    def has(self, *key: object) -> bool:
        """Whether a run is there."""
        return tuple(field(value) for value in key) in self._there

    def add(self, row: Row) -> None:
        """Append a run."""
        entry = {name: field(value) for name, value in row.items()}
        RESULTS.mkdir(exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(entry), lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerow(entry)
        self.rows.append(entry)
        self._there.add(tuple(entry[column] for column in self.key))

    def where(self, **wanted: object) -> list[dict[str, str]]:
        """Return the runs whose columns hold these values."""
        return [row for row in self.rows if all(row[name] == field(value) for name, value in wanted.items())]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return a mean and the half width of its 95 % interval (Student's)."""
    found = np.asarray(list(values), dtype=float)
    if len(found) < 2:
        return float(found.mean()), float("nan")
    return float(found.mean()), float(student.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))


def save(figure: Figure, name: str) -> None:
    """Write a picture to results/; the same picture gives the same file."""
    plt.rcParams["svg.hashsalt"] = "stepwell"
    figure.tight_layout()
    figure.savefig(RESULTS / name, metadata={"Date": None})
