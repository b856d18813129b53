"""Scales: each dtype rounds as another library or integer arithmetic does, and a fitted scale is a fixed point of refitting."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import WEIGHT_FORMATS, gaussian, seeded

from stepwell import scales, shrink
from stepwell.formats import E8M0, FP4_E2M1, FP8_E4M3, integer
from stepwell.presets import fp8, intn
from stepwell.quantizers import Quantizer

SIGNED = [format for format in WEIGHT_FORMATS if format.levels != "affine"]


def spread(count: int, low: int, high: int) -> torch.Tensor:
    """Return positive float32 numbers, log-uniform between powers of two, and those powers with their neighbours."""
    random = torch.exp2(torch.rand(count, generator=seeded(0), dtype=torch.float64) * (high - low) + low).float()
    powers = torch.exp2(torch.arange(low, high, dtype=torch.float64)).float()
    return torch.cat([random, powers, torch.nextafter(powers, torch.tensor(0.0)), torch.nextafter(powers, torch.tensor(torch.inf))])


@pytest.mark.parametrize(("name", "theirs"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_scales_round_as_numpy_does_and_saturate_instead_of_overflowing(name, theirs):
    scale = torch.cat([spread(2000, -30, 15), -spread(100, -30, 15)])
    assert np.array_equal(scales.store(scale, name, "nearest").numpy(), scale.numpy().astype(theirs).astype(np.float32))
    top = float(torch.finfo(scales.TORCH_DTYPES[name]).max)
    huge = torch.tensor([3.4e38, -3.4e38])
    assert scales.store(huge, name, "nearest").tolist() == [top, -top]


def test_e4m3_scales_are_the_smallest_value_above():
    scale = spread(2000, -9, 8).clamp(max=448)
    found = scales.store(scale, "e4m3", "up")
    values = torch.tensor([value for value in FP8_E4M3.values if value >= 0])
    slack = scale * (1 - 2**-20)  # what lies within 2**-20 above a value counts as that value
    assert bool((found >= slack).all())
    below = values[(torch.searchsorted(values, found) - 1).clamp(min=0)]
    assert bool(((below < slack) | (found == 0)).all())
    assert bool((scales.store(found, "e4m3", "up") == found).all())
    assert torch.equal(scales.store(-scale, "e4m3", "up"), -found)  # signed scales of "full" grids


def test_e4m3_scales_to_nearest_are_torch_casts():
    scale = torch.cat([spread(2000, -9, 8), -spread(200, -9, 8)])
    assert torch.equal(scales.store(scale, "e4m3", "nearest"), scale.to(torch.float8_e4m3fn).float())


def test_e8m0_scales_round_up_or_down_to_powers_of_two():
    scale = spread(2000, -126, 127)
    exact = [Fraction(value) for value in scale.tolist()]

    def floor_log2(value: Fraction) -> int:
        power = value.numerator.bit_length() - value.denominator.bit_length()
        return power if value >= Fraction(2) ** power else power - 1

    down = torch.tensor([2.0 ** floor_log2(value) for value in exact])
    assert torch.equal(scales.store(scale, "e8m0", "floor"), down)
    # rounding up forgives a relative 2**-20
    slack = [value / (1 + Fraction(1, 2**20)) for value in exact]
    up = torch.tensor([2.0 ** (k if value == Fraction(2) ** (k := floor_log2(value)) else k + 1) for value in slack])
    assert torch.equal(scales.store(scale, "e8m0", "up"), up)


def test_e8m0_scales_are_what_ml_dtypes_holds_and_have_no_zero():
    scale = scales.store(torch.cat([spread(500, -126, 127), torch.tensor([0.0, 1e-45, 3e38])]), "e8m0", "up")
    held = scale.numpy().astype(ml_dtypes.float8_e8m0fnu)
    assert np.array_equal(held.astype(np.float32), scale.numpy())
    assert held[-3:].view(np.uint8).tolist() == [0, 0, 254]


def test_the_floor_rule_is_the_exponent_of_the_largest_weight_less_that_of_the_format():
    largest = spread(2000, -40, 40)
    wanted = scales.absmax(-largest, largest, FP4_E2M1, rounding="floor")
    found = scales.store(wanted, "e8m0", "floor")
    # OCP MX v1.0, 6.3: 2**(floor(log2(max)) - emax), emax of fp4_e2m1 = 2; frexp gives floor(log2) + 1 exactly
    assert found.tolist() == [2.0 ** (math.frexp(value)[1] - 1 - 2) for value in largest.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", SIGNED, ids=str)
def test_a_settled_scale_follows_from_its_own_largest_weight(format, dtype):
    low, high = -gaussian(4000, 1, seed=0, dtype=dtype).abs() - 0.01, gaussian(4000, 1, seed=1, dtype=dtype).abs()
    scale = scales.absmax(low, high, format)
    edge = -format.edge if format.levels == "full" else format.edge
    for kept in (scale, scales.settle(scale * 0.7, format)):
        largest = kept * edge
        again = scales.absmax(torch.minimum(largest, -largest * 0.5), torch.maximum(largest, -largest * 0.5), format)
        assert torch.equal(again, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", SIGNED, ids=str)
def test_the_tensor_scale_follows_from_the_stored_scales_and_from_the_rounded_weights(format, dtype):
    for largest in gaussian(500, 1, seed=2, dtype=dtype).abs().flatten():
        found = scales.tensor_scale(largest, format)
        top = 448 * found  # the largest scale as it is stored
        assert scales.tensor_scale(top, format) == found
        assert scales.tensor_scale(top * format.edge / format.edge, format) == found
        eps = torch.finfo(dtype).eps
        assert float(found) == pytest.approx(float(largest) / 448, rel=8 * eps)  # thirteen roundings of half an eps, at most


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=8), st.integers(2, 8))
def test_the_affine_zero_point_is_minus_the_lowest_weight_in_steps(weights, bits):
    blocks, format = torch.tensor([weights], dtype=torch.float64), integer(bits, "affine")
    low, high = scales.extremes(blocks)
    scale = scales.absmax(low, high, format)
    zero = scales.zero_point(low, high, scale, format)
    if scale > 0:
        assert abs(float(zero) - min(0.0, *weights) / -float(scale)) <= 0.5 + 1e-9
    assert float(zero).is_integer()
    assert 0 <= float(zero) <= format.high


@pytest.mark.parametrize("levels", ["symmetric", "full", "mid", "affine"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_mse_rule_is_never_worse_than_absmax_and_clearly_better_at_two_bits(levels, dtype):
    weight = gaussian(64, 64, seed=3)
    found = {}
    for rule in ("absmax", "mse"):
        quantizer = intn(2, block=32, scale=rule, levels=levels, scale_dtype=dtype)
        found[rule] = (quantizer(weight) - weight).reshape(-1, 32).square().sum(1)
    assert bool((found["mse"] <= found["absmax"]).all())
    assert found["mse"].sum() < 0.95 * found["absmax"].sum()


@pytest.mark.parametrize("dtype", ["e8m0", "e4m3"])
def test_the_mse_rule_helps_where_scales_are_coarse_too(dtype):
    weight = gaussian(64, 64, seed=3)
    absmax, mse = (intn(2, scale=rule, scale_dtype=dtype)(weight) for rule in ("absmax", "mse"))
    assert float((mse - weight).square().sum()) < 0.95 * float((absmax - weight).square().sum())


def test_the_mse_rule_finds_the_best_of_its_shrink_factors():
    weight = gaussian(1, 32, seed=4, dtype=torch.float64)
    quantizer = intn(3, block=None, scale="mse")
    largest = float(weight.abs().max()) / 3
    errors = {factor: sum(min((float(w) - largest * factor * c) ** 2 for c in range(-3, 4)) for w in weight[0]) for factor in scales.SHRINK}
    best = min(errors, key=errors.__getitem__)
    assert float(quantizer.scale(weight)) == pytest.approx(largest * best, rel=1e-14)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "max"}, "`scale`.*'max'"),
        ({"rule": True}, "`scale`.*True"),
        ({"rule": None}, "`scale`.*None"),
        ({"rule": 0.0}, "`scale`.*0.0"),
        ({"rule": -1}, "`scale`.*-1"),
        ({"rule": float("nan")}, "`scale`.*nan"),
        ({"rule": float("inf")}, "`scale`.*inf"),
        ({"scale_dtype": "fp8"}, "`scale_dtype`.*'fp8'"),
        ({"scale_dtype": "e8m0"}, "`scale_rounding`.*'nearest'"),
        ({"scale_rounding": "up"}, "`scale_rounding`.*'up'"),
        ({"scale_dtype": "e8m0", "scale_rounding": "up", "format": integer(4, "full")}, "`scale_dtype` 'e8m0'.*int4/full"),
        ({"zero": "low"}, "`zero`.*'low'"),
        ({"zero": "minimum"}, "`zero='minimum'`.*int4"),
        ({"zero": "minimum", "format": integer(4, "affine"), "rule": "mse"}, "`zero='minimum'`.*mse"),
        ({"compute": "fp8"}, "`compute`.*'fp8'"),
        ({"block": 0}, "`block`.*0"),
        ({"format": E8M0}, "`format`.*e8m0"),
    ],
)
def test_options_that_do_not_exist_or_do_not_go_together_are_refused_by_value(options, said):
    with pytest.raises(ValueError, match=said):
        Quantizer(**{"format": integer(4), **options})


@pytest.mark.parametrize("options", [{}, {"levels": "affine"}, {"levels": "full", "scale_dtype": "fp16"}], ids=str)
@pytest.mark.parametrize("block", [32, "channel"])
def test_searched_scales_do_not_depend_on_how_many_are_searched_together(block, options, monkeypatch):
    weight, q = gaussian(96, 64, seed=5), intn(3, block=block, scale="mse", **options)
    together = q.encode(weight)
    monkeypatch.setattr(shrink, "PIECE", 7 * 64)  # seven rows at a time, the last group shorter
    apart = q.encode(weight)
    assert torch.equal(together.scales, apart.scales)
    assert torch.equal(together.codes, apart.codes)


def test_searched_scale_of_a_large_weight_has_the_least_error(monkeypatch):
    # one block in several pieces: its error is a sum of sums, so the choice is judged in float64, where no other factor is better
    weight, q = gaussian(64, 96, seed=6), intn(3, block=None, scale="mse")
    monkeypatch.setattr(shrink, "PIECE", 1000)
    found, widest = q.scale(weight), weight.abs().max() / 3

    def error(scale):
        units = (weight.double() / scale.double()).round().clamp(-3, 3)
        return (units * scale.double() - weight.double()).square().sum().item()

    assert error(found) <= min(error(widest * factor) for factor in scales.SHRINK) * (1 + 1e-5)  # float32 sums of 6144 squares


EARLY = [
    intn(8, block=32, scale="mse"),
    intn(4, block="channel", scale="mse"),
    intn(8, block=None, scale="mse"),
    intn(8, block=32, scale="mse", levels="full", scale_dtype="fp16"),
    intn(6, block=32, scale="mse", levels="mid"),
    intn(8, block=32, scale="mse", levels="affine"),
    intn(8, block=32, scale="mse", compute="bf16"),
    fp8(block=32, scale="mse"),
]


@pytest.mark.parametrize("q", EARLY, ids=str)
def test_a_search_that_stops_early_would_have_found_nothing_better(q, monkeypatch):
    weight = gaussian(64, 96, seed=8)
    weight[:, ::5] *= 4  # some rows with a long tail, some without
    early = q.encode(weight)
    monkeypatch.setattr(shrink, "LOOKS", ())
    assert torch.equal(early.scales, q.encode(weight).scales)


def test_most_of_a_search_at_eight_bits_is_saved(monkeypatch):
    counted, missed = [], shrink._missed
    monkeypatch.setattr(shrink, "_missed", lambda *given: counted.append(1) or missed(*given))
    intn(8, block=32, scale="mse").scale(gaussian(64, 96, seed=9))
    assert len(counted) < 20  # of 53


def test_the_search_sees_what_the_compute_dtype_makes_of_the_weights():
    weight, q = gaussian(8, 64, seed=10), intn(8, block="channel", scale="mse", compute="bf16")
    wide, found = weight.abs().amax(1, keepdim=True) / 127, q.scale(weight)

    def error(scale):
        return (q(weight, scale=scale) - weight).double().square().sum(1)

    least = torch.stack([error(wide * factor) for factor in scales.SHRINK]).amin(0)
    assert (error(found) <= least * (1 + 1e-4)).all()
