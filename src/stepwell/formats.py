"""Formats: the finite grids of element values a number is rounded to. Plain Python, no tensors.

A grid is listed once, sorted, with the code that is stored for each value. Integer grids store signed integers ("mid" grids
store `value - 1/2`, "affine" grids store unsigned integers), float grids store their bit patterns. Training, theory and export read
the same record.

Sources: OCP Microscaling Formats (MX) v1.0 for fp4_e2m1, fp8_e4m3, fp8_e5m2 and e8m0.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

Levels = Literal["symmetric", "full", "mid", "affine"]

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Format:
    """A finite sorted grid of element values, in units of the scale.

    Attributes:
        name: the field's name, for example `int4` or `fp4_e2m1`.
        bits: bits of one stored code.
        values: the grid, strictly increasing.
        codes: the stored code of each value, same length.
        levels: how an integer grid lies around zero; None for float grids.
        mantissa: mantissa bits of a float grid, at least one; None for other grids.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    codes: tuple[int, ...]
    levels: Levels | None = None
    mantissa: int | None = None

    @property
    def uniform(self) -> bool:
        """Whether neighbouring values are one unit apart everywhere, so that rounding is arithmetic."""
        return self.levels is not None

    @property
    def low(self) -> float:
        """The lowest value."""
        return self.values[0]

    @property
    def high(self) -> float:
        """The highest value."""
        return self.values[-1]

    @property
    def edge(self) -> float:
        """The value that the scale rule puts a block's largest weight on: the largest magnitude that the sign allows."""
        return -self.low if self.levels == "full" else self.high

    @property
    def shift(self) -> float:
        """What is added to a uniform grid's values to make them integer codes: -1/2 for "mid", else 0."""
        return -0.5 if self.levels == "mid" else 0.0

    @property
    def finest(self) -> float:
        """The smallest positive value of a float grid, which is the distance between its subnormals."""
        return self.values[len(self.values) // 2 + 1]

    def __str__(self) -> str:
        return self.name if self.levels in (None, "symmetric") else f"{self.name}/{self.levels}"


@lru_cache(maxsize=None, typed=True)  # typed: 4.0 must not find what was kept for 4
def integer(bits: int, levels: Levels = "symmetric") -> Format:
    """Return the uniform integer grid of `bits` bits.

    Args:
        bits: code width, 2..8.
        levels: "symmetric" `-q..q` with `q = 2**(bits-1) - 1`; "full" `-(q+1)..q`, to be used with a signed scale; "mid" the
            half-odd values `+-1/2, +-3/2, ..` (no zero); "affine" `0..2**bits - 1`, to be used with a zero point.

    Raises:
        ValueError: `bits` outside 2..8 or unknown `levels`.

    >>> integer(3).values
    (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    >>> integer(2, "mid").values, integer(2, "mid").codes
    ((-1.5, -0.5, 0.5, 1.5), (-2, -1, 0, 1))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"`bits` must be an integer from {MIN_BITS} to {MAX_BITS}: got {bits!r}. For one and a half bits use `ternary()`.")
    top = 2 ** (bits - 1)
    codes = {
        "symmetric": range(1 - top, top),
        "full": range(-top, top),
        "mid": range(-top, top),
        "affine": range(2 * top),
    }.get(levels)
    if codes is None:
        raise ValueError(f"`levels` must be 'symmetric', 'full', 'mid' or 'affine': got {levels!r}.")
    shift = 0.5 if levels == "mid" else 0.0
    return Format(f"int{bits}", bits, tuple(code + shift for code in codes), tuple(codes), levels)


@cache
def floating(name: str, exponent: int, mantissa: int, bias: int, finite: float) -> Format:
    """Return a sign, exponent and mantissa grid with subnormals; magnitudes above `finite` are no numbers.

    Args:
        name: the format's name.
        exponent, mantissa: field widths in bits.
        bias: exponent bias.
        finite: the largest finite value; bit patterns beyond it stand for infinity or NaN and are left out.

    The negative zero is left out: its code decodes to the same value.
    """
    magnitudes = []
    for code in range(2 ** (exponent + mantissa)):
        field, fraction = code >> mantissa, code % 2**mantissa
        power = max(field, 1) - bias - mantissa
        value = float(fraction + (2**mantissa if field else 0)) * 2.0**power
        if value <= finite:
            magnitudes.append((value, code))
    sign = 2 ** (exponent + mantissa)
    pairs = [(-value, code + sign) for value, code in reversed(magnitudes) if value] + magnitudes
    # without mantissa bits an even code is not an even multiple of the step, which the arithmetic of grids.py builds on
    return Format(name, 1 + exponent + mantissa, tuple(v for v, _ in pairs), tuple(c for _, c in pairs), mantissa=mantissa or None)


TERNARY = Format("ternary", 2, (-1.0, 0.0, 1.0), (-1, 0, 1), "symmetric")
FP4_E2M1 = floating("fp4_e2m1", 2, 1, 1, 6.0)
FP8_E4M3 = floating("fp8_e4m3", 4, 3, 7, 448.0)
FP8_E5M2 = floating("fp8_e5m2", 5, 2, 15, 57344.0)
E8M0 = Format("e8m0", 8, tuple(2.0 ** (k - 127) for k in range(255)), tuple(range(255)))


def formats() -> tuple[Format, ...]:
    """Return every named format, narrow to wide: what `stepwell formats` lists."""
    variants: tuple[Levels, ...] = ("symmetric", "full", "mid", "affine")
    integers = tuple(integer(bits, levels) for bits in range(MIN_BITS, MAX_BITS + 1) for levels in variants)
    return (TERNARY, *integers, FP4_E2M1, FP8_E4M3, FP8_E5M2, E8M0)
