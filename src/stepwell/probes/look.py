"""Look: what a `Log` finds at one step of a training run, and how looks are written down."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stepwell.probes.stage import Cost

SHOWN = ("step", "loss", "latent_loss", "best", "cosine", "latent_cosine", "projection", "near", "compensation", "flips")


@dataclass(frozen=True)
class Look:
    """One look at a run; exact for the given data. Where a weight is not a finite number, everything that would need it is NaN.

    Symbols: b = reference, w = latent weights, q = deployed weights, r = b rounded on q's grid; see `inward` (D4), `latent` (D7) and
    `health`.

    Attributes:
        step: optimizer steps done.
        loss, latent_loss: L(q) and L(w), BatchNorm statistics as the model holds them.
        best: the lowest L(q) of all looks so far.
        outside: whether L(q) exceeds L(b) by more than the tolerance.
        cosine, latent_cosine: of the descent direction at q, and at w, with the way from q to b.
        projection: fall of the loss at q per weight unit on that way.
        changed: share of codes that differ from r's.
        near: share of codes at most one grid step from r's.
        steps_moved, farthest: mean and largest move of a code from r's, in grid steps.
        compensation: cos(w - b, -(r - b)): above 0 the latent weights make up for the rounding error.
        distance, rounded_distance, latent_distance: |q - b|, |r - b| and |w - b|, in weight units.
        flips, oscillation, dead, clipped, off_grid, finite: `health` since the look before, over all weights; `off_grid` is its distance.
        cost: passes over the data.
    """

    step: int
    loss: float
    latent_loss: float
    best: float
    outside: bool
    cosine: float
    latent_cosine: float
    projection: float
    changed: float
    near: float
    steps_moved: float
    farthest: int
    compensation: float
    distance: float
    rounded_distance: float
    latent_distance: float
    flips: float
    oscillation: float
    dead: float
    clipped: float
    off_grid: float
    finite: bool
    cost: Cost


def lost(step: int, best: float) -> Look:
    """Return the look at weights that are no finite numbers."""
    unknown = dict.fromkeys((field.name for field in fields(Look)), math.nan)
    known = {"step": step, "best": best, "outside": True, "farthest": 0, "finite": False, "cost": Cost(0)}
    return Look(**{**unknown, **known})  # type: ignore[arg-type]


def row(look: Look) -> dict[str, Any]:
    """Return a look as plain numbers by column, the cost as `forward` and `backward` passes."""
    numbers = asdict(look)
    del numbers["cost"]
    return {**numbers, "forward": look.cost.forward, "backward": look.cost.backward}


def from_row(numbers: Mapping[str, Any]) -> Look:
    """Return the look that `row` was made of."""
    own = {key: value for key, value in numbers.items() if key not in ("forward", "backward")}
    return Look(**own, cost=Cost(numbers["forward"], numbers["backward"]))


def write_csv(looks: Sequence[Look], path: str | Path) -> None:
    """Write one line per look, with every digit."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row(looks[0])))
        writer.writeheader()
        writer.writerows(map(row, looks))


def write_json(looks: Sequence[Look], about: Mapping[str, float], path: str | Path) -> None:
    """Write what holds for all looks, and the looks; numbers that are not finite become null."""
    whole = {**about, "looks": [{key: _known(value) for key, value in row(look).items()} for look in looks]}
    Path(path).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table(looks: Sequence[Look]) -> str:
    """Return the columns that tell the story, one line per look."""
    lines = [" ".join(f"{key:>13}" for key in SHOWN)]
    for look in looks:
        values = (getattr(look, key) for key in SHOWN)
        lines.append(" ".join(f"{value:>13}" if isinstance(value, int) else f"{value:>13.4f}" for value in values))
    return "\n".join(lines)


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
