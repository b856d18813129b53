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
    ],
)
def test_options_outside_the_list_are_refused_by_value(build, said):
    with pytest.raises(ValueError, match=said):
        build()
