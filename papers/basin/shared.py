"""What the files of this folder share: where results go, how they are written and read, means with errors. Running it does nothing."""

import csv
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from stepwell.theory import Valley

RESULTS = Path(__file__).parent / "results"
BLUE, BROWN, GREY, GREEN, RED = "#1f4e8c", "#b5651d", "#999999", "#3b7d4f", "#a63d40"
Array = NDArray[np.float64]


def write(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to results/, six digits; None is an empty field."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[field(value) for value in row] for row in rows])


def field(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.6g}"


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a table in results/, by column; none, with a message, where nobody has made it yet."""
    path = RESULTS / name
    if not path.exists():
        print(f"skipped: results/{name} is not there")
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(figure: Figure, name: str) -> None:
    """Write a picture to results/; the same picture gives the same file."""
    plt.rcParams["svg.hashsalt"] = "stepwell"
    figure.tight_layout()
    figure.savefig(RESULTS / name, metadata={"Date": None})


def share(hits: ArrayLike) -> tuple[float, float]:
    """Return the share of hits and its binomial standard error; of none or all, the error of one hit more or less."""
    found = np.asarray(hits, dtype=bool)
    count = len(found)
    p = float(found.mean())
    inner = min(max(p, 1 / count), 1 - 1 / count)
    return p, sqrt(inner * (1 - inner) / count)


def mean(values: ArrayLike) -> tuple[float, float]:
    """Return a mean and its standard error."""
    found = np.asarray(values, dtype=float)
    return float(found.mean()), float(found.std(ddof=1) / sqrt(len(found)))


def unit_normals(rng: np.random.Generator, count: int, dim: int) -> Array:
    """Return `count` random orthonormal rows in `dim` dimensions."""
    return np.asarray(np.linalg.qr(rng.normal(size=(dim, count)))[0].T)


def outside(rng: np.random.Generator, draws: int, count: int, dim: int, half_width: float) -> list[tuple[Valley, Array]]:
    """Return random valleys around a random point w = c that RTN leaves, with that point; those that RTN stays in are drawn again."""
    found: list[tuple[Valley, Array]] = []
    while len(found) < draws:
        w = rng.uniform(-0.5, 0.5, dim)
        valley = Valley(unit_normals(rng, count, dim), w, half_width)
        if not valley.inside(valley.rtn(w)):
            found.append((valley, w))
    return found
