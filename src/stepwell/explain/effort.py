"""Effort: how much is measured, and about how many passes that takes."""

from dataclasses import dataclass
from typing import Literal

WIDTH = 20  # forward passes of a usual width: 10 to 31


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        name: "quick", "normal" or "full".
        positions: along a line; 0 is the float weights, 1 the rounded ones.
        draws: random directions of rho_uniform.
        rounds: gradients of the flip search.
        steps: of box QAT.
        plane: points along each side of the 2-D slice.
        every: whether every grid on which rounding fails gets a closer look; otherwise the widest such grid of every scheme.
    """

    name: Literal["quick", "normal", "full"]
    positions: tuple[float, ...]
    draws: int
    rounds: int
    steps: int
    plane: int
    every: bool


QUICK = Effort("quick", (0.0, 0.25, 0.5, 0.75, 1.0, 1.5), draws=1, rounds=4, steps=20, plane=5, every=False)
NORMAL = Effort("normal", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5), draws=1, rounds=12, steps=60, plane=9, every=False)
FULL = Effort("full", tuple(k / 10 for k in range(16)), draws=3, rounds=40, steps=240, plane=17, every=True)


def planned(effort: Effort, *, grids: int, schemes: int, layers: int, batches: tuple[int, int]) -> float:
    """Return about how many passes over all batches will be made, a backward pass counted as two forward passes.

    Args:
        effort: how much is measured.
        grids: how many grids.
        schemes: how many of them differ in more than bits: each gets one closer look unless every failing grid does.
        layers: quantized parameters.
        batches: (for searching and calibrating, for measuring).
    """
    search, measure = batches
    search_share, measure_share = search / max(search + measure, 1), measure / max(search + measure, 1)
    each = measure_share * (6 + WIDTH * (effort.draws + 1) + len(effort.positions) + 6) + search_share * layers
    closer = measure_share * (2 * layers + len(effort.positions) + 2 * effort.plane**2 + 40)
    closer += search_share * (5 * effort.rounds + 6) + 3 * effort.steps / max(search + measure, 1)
    looks = grids if effort.every else schemes
    return grids * each + looks * closer + 3 * WIDTH * measure_share + 3
