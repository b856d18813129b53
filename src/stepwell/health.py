"""Health: what quantized training does to the codes, as fractions; pure functions of codes and blocks.

Flips are codes that changed between two looks; an oscillation is a flip that came back to where it was two looks ago (Nagel et al.,
"Overcoming oscillations in quantization-aware training", arXiv:2203.11086); a dead weight has never changed its code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell import grids
from stepwell.quantizers import Quantizer
from stepwell.scales import Fit


@dataclass(frozen=True)
class Vitals:
    """One parameter, or all of them together; every number but `elements` is a fraction of the elements, or NaN before a second look.

    Attributes:
        elements: how many weights.
        flips: codes that changed since the last look.
        oscillation: codes that changed and are back where they were two looks ago.
        dead: codes that have not changed since the first look.
        clipped: weights beyond the grid's range by more than rounding error.
        distance: mean distance to the nearest grid value, in units of the scale (0.25 for weights spread evenly over unit cells).
        finite: whether every weight is a finite number.
    """

    elements: int
    flips: float
    oscillation: float
    dead: float
    clipped: float
    distance: float
    finite: bool


@dataclass(frozen=True)
class Health:
    """Vitals by parameter name; `total` weighs them by their elements, `print` shows a table."""

    parameters: Mapping[str, Vitals]

    @property
    def total(self) -> Vitals:
        """All parameters together."""
        rows = list(self.parameters.values())
        elements = sum(row.elements for row in rows)
        parts = (sum(getattr(row, key) * row.elements for row in rows) / max(elements, 1) for key in FRACTIONS)
        return Vitals(elements, *parts, finite=all(row.finite for row in rows))  # type: ignore[misc]

    @property
    def sick(self) -> tuple[str, ...]:
        """Names of parameters that hold a NaN or an infinity."""
        return tuple(name for name, row in self.parameters.items() if not row.finite)

    def __str__(self) -> str:
        width = max([len(name) for name in self.parameters] + [5])
        lines = [f"{'name':<{width}}  {'elements':>10}  " + "  ".join(f"{key:>11}" for key in FRACTIONS)]
        for name, row in [*self.parameters.items(), ("total", self.total)]:
            cells = "  ".join(f"{'-' if math.isnan(getattr(row, key)) else format(getattr(row, key), '.4f'):>11}" for key in FRACTIONS)
            lines.append(f"{name:<{width}}  {row.elements:>10,}  {cells}{'' if row.finite else '  NOT FINITE'}")
        if any(math.isnan(row.flips) for row in self.parameters.values()):
            lines.append("-: flips and dead need a second look, oscillation a third. Call `health()` again after some steps.")
        elif any(math.isnan(row.oscillation) for row in self.parameters.values()):
            lines.append("-: oscillation needs a third look. Call `health()` again after some steps.")
        return "\n".join(lines)


FRACTIONS = ("flips", "oscillation", "dead", "clipped", "distance")


class Watch:
    """The codes of one parameter at the first, the last but one and the last look."""

    def __init__(self) -> None:
        """Start without a look."""
        self._codes: list[Tensor] = []
        self._moved: Tensor | None = None

    def look(self, blocks: Tensor, quantizer: Quantizer, fit: Fit | None = None) -> Vitals:
        """Compare `(blocks, block)` weights with what was seen before."""
        blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
        finite = bool(blocks.isfinite().all())
        fit = quantizer.fit(blocks) if fit is None else fit
        units = fit.to_units(blocks).nan_to_num_()
        values = grids.round_nearest(units, quantizer.format)
        codes = grids.to_codes(values, quantizer.format)
        flips, back, dead = torch.nan, torch.nan, torch.nan
        if self._codes:
            changed = codes != self._codes[-1]
            self._moved = changed if self._moved is None else self._moved | changed
            flips, dead = fraction(changed), 1 - fraction(self._moved)
            if len(self._codes) > 1:
                back = fraction(changed & (codes == self._codes[-2]))
        self._codes = [*self._codes[-1:], codes]
        return Vitals(codes.numel(), flips, back, dead, clipped(units, quantizer), distance(units, values), finite)


def fraction(mask: Tensor) -> float:
    """Return the share of true elements."""
    return float(mask.double().mean()) if mask.numel() else 0.0


def clipped(units: Tensor, quantizer: Quantizer) -> float:
    """Return the share of weights, in grid units, beyond the grid's range by more than 1e-5 of it."""
    low, high = quantizer.format.low, quantizer.format.high
    slack = 1e-5 * max(-low, high)
    return fraction((units < low - slack) | (units > high + slack))


def distance(units: Tensor, values: Tensor) -> float:
    """Return the mean distance of weights to their grid values, both in grid units."""
    return float((units - values).abs().double().mean()) if units.numel() else 0.0
