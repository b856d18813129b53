"""Rounding in grid units, against a slow search through the grid and against other libraries' casts."""

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.cases import FORMATS, WEIGHT_FORMATS, seeded, widest
from torch import Tensor

from stepwell import formats, grids
from stepwell.formats import Format, integer
from stepwell.rounding import nearest


def units(format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return points in and beyond a grid's range: its values, the middles between them, an ulp to either side, and random ones."""
    values = torch.tensor(format.values, dtype=torch.float64)
    middle = (values[1:] + values[:-1]) / 2
    reach = min(1.5 * max(-format.low, format.high), torch.finfo(torch.float32).max)
    random = (torch.rand(2000, generator=seeded(0), dtype=torch.float64) * 2 - 1) * reach
    # log-uniform magnitudes reach the fine end of float grids
    small = torch.exp2(torch.rand(2000, generator=seeded(1), dtype=torch.float64) * 30 - 20) * random.sign()
    points = torch.cat([values, middle, random, small.clamp(-reach, reach), torch.tensor([reach, -reach, 0.0, -0.0])]).to(dtype)
    infinity = torch.full_like(points, torch.inf)
    return torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)]).clamp(-reach, reach)


def searched(points: Tensor, format: Format) -> Tensor:
    """Round by comparing with every middle, which float64 holds exactly (a difference would not be exact beside a middle)."""
    grid, codes, x = np.array(format.values), np.array(format.codes), points.double().numpy()[:, None]
    middle = (grid[1:] + grid[:-1]) / 2
    above = (x > middle) | ((x == middle) & (codes[1:] % 2 == 0))
    return torch.from_numpy(grid[above.sum(1)]).to(points.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_nearest_is_what_a_search_through_the_grid_finds(format, dtype):
    points = units(format, dtype)
    assert torch.equal(grids.round_nearest(points, format), searched(points, format))


@pytest.mark.parametrize(
    ("format", "cast"), [(formats.FP8_E4M3, torch.float8_e4m3fn), (formats.FP8_E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_rounds_like_torch_casts_inside_the_range(format, cast):
    points = units(format)
    points = points[points.abs() <= format.high]
    assert torch.equal(grids.round_nearest(points, format), points.to(cast).float())
    codes = grids.to_codes(grids.round_nearest(points, format), format)
    nonzero = grids.round_nearest(points, format) != 0  # torch keeps the sign of a zero
    assert torch.equal(codes[nonzero], points.to(cast).view(torch.uint8)[nonzero])


def test_fp4_rounds_like_ml_dtypes_casts_and_saturates_alike():
    points = units(formats.FP4_E2M1)
    theirs = points.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(grids.round_nearest(points, formats.FP4_E2M1).numpy(), theirs)


@pytest.mark.parametrize("format", WEIGHT_FORMATS, ids=str)
def test_the_bracket_is_two_neighbours_with_the_clamped_point_between(format):
    points = units(format)
    lower, x, upper, even = grids.bracket(points, format)
    values = torch.tensor(format.values)
    index = torch.searchsorted(values, lower)
    assert torch.equal(values[index], lower)
    assert torch.equal(values[index + 1], upper)
    assert bool(((lower <= x) & (x <= upper)).all())
    assert torch.equal(x, points.clamp(format.low, format.high))
    assert torch.equal(even, torch.tensor(format.codes)[index + 1] % 2 == 0)


@pytest.mark.parametrize("format", WEIGHT_FORMATS, ids=str)
def test_the_closer_end_of_the_bracket_is_the_nearest_value(format):
    points = units(format)
    # an ulp beside a middle, a float difference may see a tie where there is none: keep two ulps of the largest value away from middles
    middle = torch.tensor([(a + b) / 2 for a, b in zip(format.values, format.values[1:], strict=False)])
    clear = (points[:, None] - middle).abs().amin(1) > 2 * torch.finfo(torch.float32).eps * widest(format)
    clear |= torch.isin(points, middle)
    assert torch.equal(nearest(grids.bracket(points, format))[clear], grids.round_nearest(points, format)[clear])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_and_values_are_each_others_inverse(format):
    values, codes = torch.tensor(format.values), torch.tensor(format.codes)
    assert torch.equal(grids.to_codes(values, format).long(), codes)
    assert torch.equal(grids.from_codes(grids.to_codes(values, format), format, torch.float32), values)


@pytest.mark.parametrize(
    ("format", "code"),
    [
        (integer(4), -8),
        (integer(4), 8),
        (integer(8, "affine"), -1),
        (formats.TERNARY, 2),
        (formats.FP4_E2M1, 16),
        (formats.FP8_E4M3, 0x7F),
        (formats.FP8_E4M3, 0xFF),
        (formats.FP8_E5M2, 0x7C),
        (formats.E8M0, 255),
    ],
    ids=str,
)
def test_codes_that_stand_for_nothing_are_refused_by_value(format, code):
    codes = torch.tensor([format.codes[0], code], dtype=torch.int16)
    with pytest.raises(ValueError, match=rf"`codes`.*{code}\b"):
        grids.from_codes(codes, format, torch.float32)


def test_the_negative_zero_of_float_formats_is_read_as_zero():
    assert grids.from_codes(torch.tensor([8]), formats.FP4_E2M1, torch.float32) == 0
    assert grids.from_codes(torch.tensor([128]), formats.FP8_E4M3, torch.float32) == 0
