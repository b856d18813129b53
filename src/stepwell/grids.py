"""Grid arithmetic: tensors in units of the scale, rounded to a format's values or bracketed by them.

Uniform and float grids round by arithmetic, all others by a table of thresholds, which costs twenty times as much. On a float grid the
neighbours of an element are multiples of a step, a power of two that follows from the element's exponent bits; the multiple is odd exactly
where the code is. Everything here is elementwise, allocates little and checks nothing: it runs in every training step.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell.formats import Format
from stepwell.rounding import Bracket


def round_nearest(units: Tensor, format: Format) -> Tensor:
    """Return the closest grid value of each element, ties to the even code.

    Args:
        units: `(*shape)`, weights divided by their scale; float32 or float64.
        format: the grid.

    Returns:
        `(*shape)` grid values, saturated to the grid's range.
    """
    if format.uniform:
        if format.shift:
            # half-odd values lie in the middle between integers; on an integer itself the even code, which is that integer or one less
            code = units.floor()
            odd = (code == units) & _odd(code)
            return code.sub_(odd.to(code.dtype)).clamp_(format.codes[0], format.codes[-1]).sub_(format.shift)
        return units.round().clamp_(format.low, format.high)
    if format.mantissa is not None:
        x = units.detach().clamp(format.low, format.high)  # rounding has no slope, the sums below would
        # The last place of `anchor` is the step, and its multiple of the step is even: the sum rounds to the grid, ties to the even code.
        # Half as much again as a power of two, so that the sum stays in one octave for either sign.
        anchor = _step(x, format).mul_(1.5 / torch.finfo(x.dtype).eps)
        return x.add_(anchor).sub_(anchor)
    table = _tables(format, units.dtype, units.device)
    return table.values[torch.bucketize(units.contiguous(), table.thresholds)]


def bracket(units: Tensor, format: Format) -> Bracket:
    """Return the neighbouring grid values of each element and the element clamped to the grid's range, all in grid units."""
    x = units.clamp(format.low, format.high)
    if format.uniform:
        code = x.floor()
        if format.shift:
            code.sub_((x - code < 0.5).to(code.dtype))
        code.clamp_(format.codes[0], format.codes[-1] - 1)
        lower = code - format.shift
        return Bracket(lower, x, lower + 1, _odd(code))
    if format.mantissa is not None:
        # The highest value ends the last cell and begins none, so that nothing may lie there.
        inside = units.detach().clamp(format.low, (format.values[-2] + format.high) / 2)
        # A negative power of two begins the cells towards zero, which are finer: this moves it, and nothing else, into their octave.
        step = _step(torch.maximum(inside, inside * (1 - torch.finfo(inside.dtype).eps / 2)), format)
        multiple = inside.div_(step).floor_()
        lower = multiple * step
        return Bracket(lower, x, step.add_(lower), _odd(multiple))
    table = _tables(format, units.dtype, units.device)
    index = torch.bucketize(x.contiguous(), table.values[1:-1], right=True)
    return Bracket(table.values[index], x, table.values[index + 1], table.even[index + 1])


def round_up(magnitudes: Tensor, format: Format) -> Tensor:
    """Return the lowest value of a float grid that is not below each magnitude `(*shape)` >= 0, saturated to the grid's range."""
    x = magnitudes.clamp(max=format.high)
    step = _step(x, format)
    return x.div_(step).ceil_().mul_(step)


def to_codes(values: Tensor, format: Format) -> Tensor:
    """Return the stored codes, int8 (uint8 where they exceed 127), of exact grid values `(*shape)`."""
    dtype = code_dtype(format)
    if format.uniform:
        return (values + format.shift if format.shift else values).to(dtype)
    if format.mantissa is not None:
        step = _step(values, format)
        code = (values / step).abs_()
        code.add_((step / format.finest).log2_().round_(), alpha=2**format.mantissa)
        return code.add_(values < 0, alpha=2 ** (format.bits - 1)).to(torch.int16).to(dtype)
    table = _tables(format, values.dtype, values.device)
    return table.codes.to(dtype)[torch.searchsorted(table.values, values.contiguous())]


def code_dtype(format: Format) -> torch.dtype:
    """Return the dtype that codes are stored in."""
    return torch.uint8 if max(format.codes) > 127 else torch.int8


def from_codes(codes: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """Return the grid values `(*shape)` of stored codes; a float grid's negative zero is accepted.

    Raises:
        ValueError: a code that stands for no number of the format.
    """
    check_codes(codes, format)
    if format.uniform:
        values = codes.to(dtype)
        return values.sub_(format.shift) if format.shift else values
    allowed = _allowed(format)
    low, high = min(allowed), max(allowed)
    table = torch.full((high - low + 1,), torch.nan, dtype=dtype)
    for code, value in allowed.items():
        table[code - low] = value
    return table.to(codes.device)[codes.to(torch.int64) - low]


def check_codes(codes: Tensor, format: Format) -> None:
    """Refuse codes that the format does not have.

    Raises:
        ValueError: a code out of the format's range, or one that stands for no number.
    """
    allowed = _allowed(format)
    low, high = min(allowed), max(allowed)
    lowest, highest = int(codes.min()), int(codes.max())
    if lowest < low or highest > high:
        outside = lowest if lowest < low else highest
        raise ValueError(f"`codes` of {format} must lie in {low}..{high}: got {outside}. The file may be damaged or of another format.")
    holes = [code for code in range(low, high + 1) if code not in allowed]
    if holes:
        found = codes[torch.isin(codes, torch.tensor(holes, dtype=codes.dtype, device=codes.device))]
        if found.numel():
            raise ValueError(f"`codes` holds {found[0].item()}, which stands for no number of {format}. The file may be damaged.")


def _allowed(format: Format) -> dict[int, float]:
    """Return the value of every code; a float grid's negative zero is a second code for zero."""
    allowed = dict(zip(format.codes, format.values, strict=True))
    if not format.uniform and format.low < 0:
        allowed[2 ** (format.bits - 1)] = -0.0
    return allowed


def _step(x: Tensor, format: Format) -> Tensor:
    """Return the distance of the float grid's values in the octave of each element, which lies within the grid's range."""
    assert format.mantissa is not None
    bits, exponent = (torch.int64, 0x7FF << 52) if x.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    power = (x.view(bits) & exponent).view(x.dtype)
    return power.mul_(2.0**-format.mantissa).clamp_(min=format.finest)


def _odd(whole: Tensor) -> Tensor:
    """Return which whole numbers are odd; torch.remainder takes ten times as long."""
    return (whole.to(torch.int32) & 1).bool()


class _Table(NamedTuple):
    """A format on one device: sorted values, thresholds between them, stored codes, and which codes are even."""

    values: Tensor
    thresholds: Tensor
    codes: Tensor
    even: Tensor


@cache
def _tables(format: Format, dtype: torch.dtype, device: torch.device) -> _Table:
    """Return the tables of a format; on a threshold itself the even code wins."""
    values, codes = torch.tensor(format.values, dtype=dtype), torch.tensor(format.codes)
    middle, even = (values[1:] + values[:-1]) / 2, codes % 2 == 0
    # bucketize puts a value equal to a threshold below it: where the code above is even, the threshold moves one ulp down.
    down = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    parts = (values, torch.where(even[1:], down, middle), codes, even)
    return _Table(*(part.to(device) for part in parts))
