"""Walls: how the loss rises outside a valley's flat floor, as a function of the excess distance e >= 0.

Symbols: s = slope, ell = saturation. Linear s e; quadratic s e^2 / 2; saturating s ell (1 - exp(-e / ell)).
"""

from typing import Literal, NamedTuple, get_args

import numpy as np

from stepwell.theory.staircase import Array

Shape = Literal["linear", "quadratic", "saturating"]
SHAPES: tuple[str, ...] = get_args(Shape)


class Wall(NamedTuple):
    """A wall: its shape, its slope s, and the length ell over which a saturating one levels off."""

    shape: Shape
    slope: float
    saturation: float

    def height(self, excess: Array) -> Array:
        """Return the rise at an excess distance, elementwise; 0 at 0."""
        if self.shape == "linear":
            return self.slope * excess
        if self.shape == "quadratic":
            return self.slope / 2 * excess**2
        return -self.slope * self.saturation * np.expm1(-excess / self.saturation)

    def steepness(self, excess: Array) -> Array:
        """Return the derivative of `height`, elementwise; from outside at 0."""
        if self.shape == "linear":
            return np.full_like(excess, self.slope)
        if self.shape == "quadratic":
            return self.slope * excess
        return np.asarray(self.slope * np.exp(-excess / self.saturation))

    def range(self, excess: float) -> tuple[float, float]:
        """Return the smallest and the largest derivative on `[0, excess]`; every shape's is monotone."""
        ends = self.steepness(np.array([0.0, max(excess, 0.0)]))
        return float(ends.min()), float(ends.max())
