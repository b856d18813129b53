"""What the figures of this folder share: where results go and how they are written. Running it does nothing."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
BLUE, BROWN, GREY, GREEN = "#1f4e8c", "#b5651d", "#999999", "#3b7d4f"


def write(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to results/, six digits."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([value if isinstance(value, str) else f"{value:.6g}" for value in row] for row in rows)


def save(figure: Figure, name: str) -> None:
    """Write a picture to results/; the same picture gives the same file."""
    plt.rcParams["svg.hashsalt"] = "stepwell"
    figure.tight_layout()
    figure.savefig(RESULTS / name, metadata={"Date": None})
