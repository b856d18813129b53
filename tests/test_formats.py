"""The grids are those of torch, ml_dtypes and the textbook."""

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.cases import FORMATS

from stepwell import formats
from stepwell.formats import integer


def patterns(dtype) -> np.ndarray:
    """Return the value of all 256 bit patterns of a torch or ml_dtypes type."""
    raw = np.arange(256, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).double().numpy() if isinstance(dtype, torch.dtype) else raw.view(dtype).astype(np.float64)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (formats.FP8_E4M3, torch.float8_e4m3fn),
        (formats.FP8_E4M3, ml_dtypes.float8_e4m3fn),
        (formats.FP8_E5M2, torch.float8_e5m2),
        (formats.FP8_E5M2, ml_dtypes.float8_e5m2),
        (formats.E8M0, ml_dtypes.float8_e8m0fnu),
        (formats.E8M0, torch.float8_e8m0fnu),
    ],
)
def test_eight_bit_floats_are_the_finite_patterns_of_the_outside_type(format, dtype):
    theirs = {code: value for code, value in enumerate(patterns(dtype)) if np.isfinite(value)}
    if format.low < 0:
        assert theirs.pop(128) == 0  # the negative zero, which we leave out
    assert dict(zip(format.codes, format.values, strict=True)) == theirs


def test_fp4_is_ml_dtypes_e2m1():
    theirs = dict(enumerate(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)))
    assert theirs.pop(8) == 0
    assert dict(zip(formats.FP4_E2M1.codes, formats.FP4_E2M1.values, strict=True)) == theirs


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (formats.FP4_E2M1, ml_dtypes.float4_e2m1fn),
        (formats.FP8_E4M3, ml_dtypes.float8_e4m3fn),
        (formats.FP8_E5M2, ml_dtypes.float8_e5m2),
    ],
)
def test_float_grids_know_their_mantissa_and_their_finest_step(format, dtype):
    theirs = ml_dtypes.finfo(dtype)
    assert (format.mantissa, format.finest) == (theirs.nmant, float(theirs.smallest_subnormal))


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_grids_have_the_levels_their_name_says(bits):
    top = 2 ** (bits - 1)
    assert integer(bits).values == tuple(range(-top + 1, top)) == integer(bits).codes
    assert integer(bits, "full").values == tuple(range(-top, top))
    assert integer(bits, "affine").values == tuple(range(2**bits))
    assert integer(bits, "mid").values == tuple((2 * k + 1) / 2 for k in range(-top, top))
    assert all(2 * value == 2 * code + 1 for value, code in zip(integer(bits, "mid").values, integer(bits, "mid").codes, strict=True))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_grids_are_sorted_and_their_codes_fit(format):
    assert all(lower < upper for lower, upper in zip(format.values, format.values[1:], strict=False))
    assert len(set(format.codes)) == len(format.values)
    unsigned = min(format.codes) >= 0
    low, high = (0, 2**format.bits - 1) if unsigned else (-(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1)
    assert low <= min(format.codes)
    assert max(format.codes) <= high
    neighbours = zip(format.codes, format.codes[1:], strict=False)
    assert all((a + b) % 2 == 1 for a, b in neighbours)  # of two neighbours one is even: ties are never ambiguous


def test_names_tell_formats_apart():
    assert len({str(format) for format in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_outside_two_to_eight_are_refused_by_value(bits):
    with pytest.raises(ValueError, match=rf"`bits`.*got {bits!r}"):
        integer(bits)


def test_unknown_levels_are_refused_by_value():
    with pytest.raises(ValueError, match=r"`levels`.*got 'signed'"):
        integer(4, "signed")
