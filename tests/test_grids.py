"""Rounding in grid units, against a slow search through the grid and against other libraries' casts."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.cases import FORMATS, WEIGHT_FORMATS, seeded, widest
from torch import Tensor

from stepwell import formats, grids
from stepwell.formats import Format, floating, integer
from stepwell.rounding import nearest

# six-bit floats and one without mantissa bits, which no preset uses: the arithmetic is not fitted to the three that presets do use
FP6_E2M3, FP6_E3M2, E3M0 = floating("fp6_e2m3", 2, 3, 1, 7.5), floating("fp6_e3m2", 3, 2, 3, 28.0), floating("e3m0", 3, 0, 3, 16.0)
MORE = (FP6_E2M3, FP6_E3M2, E3M0)
FLOATS = (formats.FP4_E2M1, formats.FP8_E4M3, formats.FP8_E5M2, *MORE)
DTYPES = (torch.float32, torch.float64)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*FORMATS, *MORE], ids=str)
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


@pytest.mark.parametrize(
    ("format", "theirs"),
    [
        (formats.FP4_E2M1, ml_dtypes.float4_e2m1fn),
        (FP6_E2M3, ml_dtypes.float6_e2m3fn),
        (FP6_E3M2, ml_dtypes.float6_e3m2fn),
    ],
    ids=str,
)
def test_fp4_and_fp6_round_like_ml_dtypes_casts_and_saturate_alike(format, theirs):
    points = units(format)
    assert np.array_equal(grids.round_nearest(points, format).numpy(), points.numpy().astype(theirs).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_float_grids_hold_at_the_ends_of_the_dtype(format, dtype):
    """Huge, infinite and subnormal elements: to the outermost value, to a zero without sign, into the first and the last cell."""
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 8
    points = torch.tensor([torch.inf, top, -torch.inf, -top, tiny, 0.0, -0.0, -tiny], dtype=dtype)
    rounded = grids.round_nearest(points, format)
    assert rounded.tolist() == [format.high] * 2 + [format.low] * 2 + [0.0] * 4
    assert not rounded[4:].signbit().any()
    lower, x, upper, _ = grids.bracket(points, format)
    second, least = format.values[-2], min(value for value in format.values if value > 0)
    assert lower.tolist() == [second] * 2 + [format.low] * 2 + [0.0] * 3 + [-least]
    assert upper.tolist() == [format.high] * 2 + [-second] * 2 + [least] * 3 + [0.0]
    assert x.tolist() == points.clamp(format.low, format.high).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [format for format in FLOATS if format.mantissa], ids=str)
def test_rounding_up_finds_the_lowest_value_not_below(format, dtype):
    points = units(format, dtype).abs()
    grid = torch.tensor([value for value in format.values if value >= 0], dtype=torch.float64)
    saturated = points.double().clamp(max=format.high)
    expected = torch.where(grid >= saturated[:, None], grid, torch.inf).amin(1)
    assert torch.equal(grids.round_up(points, format).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*WEIGHT_FORMATS, *MORE], ids=str)
def test_the_bracket_is_two_neighbours_with_the_clamped_point_between(format, dtype):
    """A point on the grid is the lower end, but for the highest value, which ends the last cell."""
    points = units(format, dtype)
    lower, x, upper, even = grids.bracket(points, format)
    values = torch.tensor(format.values, dtype=dtype)
    index = torch.searchsorted(values, lower)
    assert torch.equal(values[index], lower)
    assert bool(((x < upper) | (x == format.high)).all())
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


@pytest.mark.parametrize("format", [integer(4), integer(3, "mid"), formats.FP4_E2M1, formats.FP8_E4M3], ids=str)
def test_no_slope_goes_through_the_grid_and_one_through_the_clamped_point(format):
    points = units(format).requires_grad_()
    found = grids.bracket(points, format)
    (slope,) = torch.autograd.grad((found.lower + 2 * found.upper + 4 * found.x).sum(), points)
    inside = (points >= format.low) & (points <= format.high)
    assert torch.equal(slope, 4 * inside.float())
    rounded = grids.round_nearest(points, format)
    assert not rounded.requires_grad or not torch.autograd.grad(rounded.sum(), points)[0].any()


@pytest.mark.parametrize("format", [integer(3, "mid"), formats.FP4_E2M1, formats.FP8_E5M2], ids=str)
def test_memory_layout_does_not_matter_and_nothing_given_is_changed(format):
    points = units(format)[:4000].reshape(40, 100)
    kept, turned = points.clone(), points.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(grids.round_nearest(turned, format), grids.round_nearest(points, format))
    assert all(torch.equal(a, b) for a, b in zip(grids.bracket(turned, format), grids.bracket(points, format), strict=True))
    assert torch.equal(points, kept)


@pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_compiled_rounding_is_eager_rounding_bit_for_bit(dtype):
    """Among others, that no compiler takes a sum apart that rounds by being a sum."""
    format = formats.FP8_E4M3

    def work(points: Tensor) -> tuple[Tensor, ...]:
        return grids.round_nearest(points, format), grids.round_up(points.abs(), format), *grids.bracket(points, format)

    compiled, points = torch.compile(work, dynamic=True, fullgraph=True), units(format, dtype)
    for given in (points, points[:4000].reshape(40, 100).t()):
        assert all(torch.equal(a, b) for a, b in zip(compiled(given), work(given), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*FORMATS, *MORE], ids=str)
def test_codes_and_values_are_each_others_inverse(format, dtype):
    values, codes = torch.tensor(format.values, dtype=dtype), torch.tensor(format.codes)
    assert torch.equal(grids.to_codes(values, format).long(), codes)
    if 0.0 in format.values:
        assert grids.to_codes(torch.tensor([-0.0], dtype=dtype), format) == 0
    assert torch.equal(grids.from_codes(grids.to_codes(values, format), format, dtype), values)


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
