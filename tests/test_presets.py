"""Presets say what they build, and refuse what nothing could be built from."""

import pytest
import torch
from tests.cases import gaussian

import stepwell as sw
from stepwell.formats import integer
from stepwell.quantizers import Quantizer


def test_presets_are_the_records_they_name():
    assert sw.int4() == Quantizer(integer(4), 32)
    assert sw.int2(block="channel") == sw.intn(2, block="channel")
    assert sw.int3(levels="mid") == sw.intn(3, levels="mid")
    assert sw.int8(scale="mse", scale_dtype="bf16") == sw.intn(8, scale="mse", scale_dtype="bf16")
    assert sw.intn(5, scale=1) == sw.intn(5, scale=1.0)  # a whole number is a scale too
    assert (sw.mxfp4().block, sw.mxfp4().scale_dtype, sw.mxfp4().scale_rounding) == (32, "e8m0", "up")
    assert sw.mxfp4(rule="floor").scale_rounding == "floor"
    assert (sw.nvfp4().block, sw.nvfp4().scale_dtype, sw.nvfp4().scale_rounding) == (16, "e4m3", "up")
    assert sw.fp8().block == "channel"
    assert (sw.fp8().format.high, sw.fp8(kind="e5m2").format.high) == (448, 57344)
    assert sw.ternary(block=None)(torch.tensor([[1.0, 0.6, -0.4, -0.6]])).tolist() == [[1, 1, 0, -1]]


def test_quantizers_are_values():
    assert len({sw.int4(), sw.int4(), sw.intn(4), sw.int4(block=64)}) == 2
    with pytest.raises(AttributeError):
        sw.int4().block = 16


def test_every_level_of_the_grid_is_used_at_two_bits():
    weight = gaussian(64, 32, seed=0)
    for levels, count in (("symmetric", 3), ("full", 4), ("mid", 4), ("affine", 4)):
        assert sw.int2(levels=levels).encode(weight).codes.unique().numel() == count


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: sw.intn(1), "`bits`.*got 1"),
        (lambda: sw.intn(9), "`bits`.*got 9"),
        (lambda: sw.intn(4.0), "`bits`.*got 4.0"),
        (lambda: sw.int4(block=0), "`block`.*got 0"),
        (lambda: sw.int4(block=-32), "`block`.*got -32"),
        (lambda: sw.int4(block="row"), "`block`.*got 'row'"),
        (lambda: sw.int4(block=32.0), "`block`.*got 32.0"),
        (lambda: sw.int4(scale="max"), "`scale`.*got 'max'"),
        (lambda: sw.int4(scale=0), "`scale`.*got 0"),
        (lambda: sw.int4(scale=-0.5), "`scale`.*got -0.5"),
        (lambda: sw.int4(scale=float("inf")), "`scale`.*got inf"),
        (lambda: sw.int4(scale=None), "`scale`.*got None"),
        (lambda: sw.int4(scale=[0.5]), r"`scale`.*got \[0.5\]"),
        (lambda: sw.int4(scale_dtype="float32"), "`scale_dtype`.*got 'float32'"),
        (lambda: sw.int4(levels="signed"), "`levels`.*got 'signed'"),
        (lambda: sw.int4(levels="full", scale_dtype="e8m0"), "`scale_dtype` 'e8m0'.*int4/full"),
        (lambda: sw.intn(4, axis="in"), "`axis`.*got 'in'"),
        (lambda: sw.intn(4, axis=1.0), "`axis`.*got 1.0"),
        (lambda: sw.intn(4, compute="fp32"), "`compute`.*got 'fp32'"),
        (lambda: sw.fp8(kind="e3m4"), "`kind`.*got 'e3m4'"),
        (lambda: sw.mxfp4(rule="even"), "`rule`.*got 'even'"),
        (lambda: sw.ternary(scale="mean"), "`scale`.*got 'mean'"),
        (lambda: sw.int4(scale=1e-50), r"`scale`.*fp32 scales, 1.18e-38 to 3.4e\+38: got 1e-50"),
        (lambda: sw.int4(scale=1e39), r"`scale`.*fp32.*got 1e\+39"),
        (lambda: sw.int4(scale=1e6, scale_dtype="fp16"), r"`scale`.*fp16 scales, 6.1e-05 to 6.55e\+04: got 1e\+06"),
        (lambda: sw.ternary(scale=1e-9, scale_dtype="fp16"), "`scale`.*fp16.*got 1e-09"),
        (lambda: sw.fp8(scale=1e-39, scale_dtype="bf16"), "`scale`.*bf16.*got 1e-39"),
        (lambda: sw.fp4(scale=1e39, scale_dtype="e8m0"), r"`scale`.*e8m0 scales, 5.88e-39 to 1.7e\+38: got 1e\+39"),
        (lambda: sw.int8(scale=1e-37, scale_dtype="e4m3"), "`scale`.*e4m3.*got 1e-37"),
        (lambda: sw.int8(scale=1e37, scale_dtype="e4m3"), r"`scale`.*e4m3.*got 1e\+37"),
    ],
)
def test_options_outside_the_list_are_refused_by_value(build, said):
    with pytest.raises(ValueError, match=said):
        build()


# the smallest and the largest normal number of each scale dtype; e4m3 scales stand under a float32 number that must be normal as well
NORMAL = [
    ("fp32", 2.0**-126, (2 - 2.0**-23) * 2.0**127),
    ("fp16", 2.0**-14, 65504.0),
    ("bf16", 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    ("e8m0", 2.0**-127, 2.0**127),
    ("e4m3", 448 * 2.0**-126, 2.0**127 / 7),
]


@pytest.mark.parametrize(("dtype", "low", "high"), NORMAL)
def test_a_fixed_scale_at_either_end_of_the_range_is_stored_as_it_is(dtype, low, high):
    weight = torch.ones(1, 32, dtype=torch.float64)
    for scale in (low, high):
        stored = sw.int4(scale=scale, scale_dtype=dtype).scale(weight).item()
        assert stored == pytest.approx(scale, rel=2.0**-20)  # e4m3: three float32 roundings and its slack
    for scale in (0.999 * low, 1.001 * high):
        if dtype != "e4m3" or scale < low:  # its upper end is any number whose product with the edge is finite
            with pytest.raises(ValueError, match=f"`scale`.*{dtype}"):
                sw.int4(scale=scale, scale_dtype=dtype)
