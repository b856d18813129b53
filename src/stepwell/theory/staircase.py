"""Staircase: the rounding function of the theory, a sorted list of levels with a threshold halfway between neighbours.

Symbols: psi = the staircase, l_k = levels, theta_k = thresholds, omega = range, Delta = spacing, T = temperature.
The smooth version is psi_T(v) = E[psi(v + T g)] with g standard normal: a deterministic function, psi itself at T = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
Kind = Literal["end", "mid", "tread", "levels"]

MIN_BITS, MAX_BITS = 1, 16
MIN_RANGE, MAX_RANGE, MAX_TEMPERATURE = 1e-6, 1e6, 1e6


class GridLike(Protocol):
    """The plain numbers that `Staircase.of` reads: a sorted grid of values."""

    @property
    def values(self) -> Sequence[float]:
        """The grid, strictly increasing, in units of the scale."""
        ...

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        ...


class QuantizerLike(Protocol):
    """The plain numbers that `Staircase.of` reads: a format and a scale rule."""

    @property
    def format(self) -> GridLike:
        """The grid of element values."""
        ...

    @property
    def rule(self) -> Any:
        """The scale rule; only a number, the fixed scale, is accepted."""
        ...


@dataclass(frozen=True)
class Staircase:
    """A saturating quantizer with a fixed range, as the theory sees it.

    Attributes:
        bits: 1..16 ("tread" needs 2).
        range: omega, 1e-6 to 1e6, in weight units.
        kind: "end" has `2**bits` levels with end points at `+-range` (mid-rise); "mid" has `2**bits` cell centres, the highest
            level half a step below `range` (mid-rise); "tread" has `2**bits - 1` levels including zero, end points at
            `+-range` (the symmetric integer grid); "levels" takes the list in `values`.
        temperature: T, 0 to 1e6, the width over which a step is smeared; 0 is the hard staircase.
        values: the levels of kind "levels", strictly increasing; None for the other kinds.

    >>> Staircase(bits=2, range=2.0, kind="tread").levels
    array([-2.,  0.,  2.])
    >>> Staircase(bits=2, range=3.0)([0.4, -1.9, 70.0])
    array([ 1., -1.,  3.])
    """

    bits: int
    range: float
    kind: Kind = "end"
    temperature: float = 0.0
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | np.integer) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"`bits` must be an integer from {MIN_BITS} to {MAX_BITS}: got {self.bits!r}.")
        if self.kind not in ("end", "mid", "tread", "levels"):
            raise ValueError(f"`kind` must be 'end', 'mid', 'tread' or 'levels': got {self.kind!r}.")
        if self.kind == "tread" and self.bits < 2:
            raise ValueError(f"`bits` must be at least 2 for kind 'tread': got {self.bits}. Use kind 'end' for one bit.")
        _check("range", self.range, MIN_RANGE, MAX_RANGE)
        _check("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if (self.values is not None) != (self.kind == "levels"):
            raise ValueError(f"`values` go with kind 'levels' and only there: got values={self.values!r} with kind={self.kind!r}.")
        if self.values is not None:
            _check_levels(self.values)

    @classmethod
    def of(cls, quantizer: QuantizerLike, *, temperature: float = 0.0) -> "Staircase":
        """Return the staircase that a quantizer with a fixed scale applies to every weight.

        Args:
            quantizer: anything with `format.values` (sorted), `format.bits` and `rule`, where the rule is the scale itself.
            temperature: T >= 0 of the smooth version.

        Raises:
            ValueError: the scale is not a fixed number, so the range would follow the weights.
        """
        scale = quantizer.rule
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not isfinite(scale) or scale == 0:
            raise ValueError(
                f"`quantizer` must have a fixed scale, a finite non-zero number: got scale rule {scale!r}. "
                "Build it with a number, for example `scale=0.25`."
            )
        if getattr(quantizer.format, "levels", None) == "affine":
            raise ValueError("`quantizer` must not have a zero point: got 'affine' levels. Use 'symmetric', 'full' or 'mid'.")
        levels = tuple(sorted(float(value) * float(scale) for value in quantizer.format.values))
        return cls(max(1, quantizer.format.bits), max(abs(levels[0]), abs(levels[-1])), "levels", temperature, levels)

    @cached_property
    def levels(self) -> Array:
        """The levels l_k, `(levels,)`, strictly increasing."""
        if self.values is not None:
            return np.array(self.values, dtype=float)
        count, half = 2**self.bits, 2 ** (self.bits - 1)
        if self.kind == "end":
            return np.asarray(self.range * (2.0 * np.arange(count) - (count - 1)) / (count - 1))
        if self.kind == "mid":
            return np.asarray(self.range * (2.0 * np.arange(count) - (count - 1)) / count)
        return np.asarray(self.range * np.arange(1.0 - half, half) / (half - 1))

    @cached_property
    def thresholds(self) -> Array:
        """The thresholds theta_k between neighbouring levels, `(levels - 1,)`."""
        return np.asarray((self.levels[1:] + self.levels[:-1]) / 2)

    @cached_property
    def steps(self) -> Array:
        """The heights l_k - l_{k-1}, `(levels - 1,)`."""
        return np.diff(self.levels)

    @cached_property
    def spacing(self) -> float | None:
        """Delta of a uniform staircase, None if the steps differ."""
        steps = self.steps
        return float(np.mean(steps)) if np.ptp(steps) <= 1e-9 * float(np.mean(steps)) else None

    @cached_property
    def symmetric(self) -> bool:
        """Whether psi(-v) = -psi(v)."""
        return bool(np.allclose(self.levels, -self.levels[::-1], rtol=0, atol=1e-12 * self.range))

    def __call__(self, weight: ArrayLike) -> Array:
        """Return psi_T(weight), elementwise and of the same shape; on a threshold the lower level (a null set)."""
        v = np.asarray(weight, dtype=float)
        if self.temperature == 0:
            return np.asarray(self.levels[np.searchsorted(self.thresholds, v)])
        return np.asarray(self.levels[0] + ndtr((v[..., None] - self.thresholds) / self.temperature) @ self.steps)

    def __str__(self) -> str:
        name = f"{len(self.levels)} levels" if self.kind == "levels" else f"{self.bits}-bit {self.kind}"
        return f"{name}, range {self.range:g}" + (f", temperature {self.temperature:g}" if self.temperature else "")


def _check(name: str, value: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"`{name}` must be a number: got {value!r}.")
    if not least <= value <= most:  # nan compares false
        raise ValueError(f"`{name}` must be a finite number from {least:g} to {most:g}: got {value!r}.")


def _check_levels(values: tuple[float, ...]) -> None:
    if len(values) < 2 or len(values) > 2**MAX_BITS or not np.all(np.isfinite(values)) or np.any(np.diff(values) <= 0):
        shown = values if len(values) <= 6 else (*values[:3], "..", *values[-3:])
        raise ValueError(f"`values` must be 2..{2**MAX_BITS} finite, strictly increasing levels: got {shown!r}.")
