"""The laws of a quantizer, for every format, scale rule, scale dtype and block."""

import math

import pytest
import torch
from tests.cases import QUANTIZERS, REPRESENTATIVES, gaussian, refit, seeded, widest
from torch import Tensor

from stepwell.blocks import to_blocks
from stepwell.presets import fp4, int2, int3, int4, int8, intn, mxfp4, nvfp4
from stepwell.quantizers import Quantizer
from stepwell.rounding import nearest, stochastic, variance

EPS = torch.finfo(torch.float32).eps


def levels(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return every value that each block's grid has, `(blocks, values)` ascending, and the steps `(blocks, 1)`, from what is stored."""
    stored = quantizer.encode(weight)
    scale = stored.scales.reshape(-1, 1) * (1 if stored.tensor_scale is None else stored.tensor_scale)
    values = torch.tensor(quantizer.format.values, dtype=scale.dtype)
    if stored.zero_points is None:
        grid = values * scale
    elif quantizer.zero == "integer":
        grid = (values - stored.zero_points.reshape(-1, 1)) * scale
    else:
        grid = values * scale + stored.zero_points.reshape(-1, 1)
    if quantizer.compute is not None:
        grid = grid.to({"bf16": torch.bfloat16, "fp16": torch.float16}[quantizer.compute]).to(grid.dtype)
    return grid.sort(1).values, scale.abs()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_every_output_is_the_closest_stored_value(quantizer):
    weight = gaussian(8, 64, seed=0)
    grid, scale = levels(quantizer, weight)
    blocks, rounded = (to_blocks(tensor, quantizer.block, quantizer.axis) for tensor in (weight, quantizer(weight)))
    assert bool((rounded[:, :, None] == grid[:, None]).any(2).all())
    best = (blocks[:, :, None] - grid[:, None]).abs().amin(2)
    # dividing by the scale and adding a zero point each move a weight by half an eps of the largest code; `compute` moves the values
    slack = 2 * EPS * max(quantizer.format.high, -quantizer.format.low) * scale
    if quantizer.compute is not None:
        slack = slack + 2 * grid.abs().amax(1, keepdim=True) * torch.finfo(torch.bfloat16).eps
    assert bool(((blocks - rounded).abs() <= best + slack).all())


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_what_scale_returns_can_be_given_back(quantizer):
    weight = gaussian(8, 64, seed=1)
    scale = quantizer.scale(weight)
    assert torch.equal(quantizer(weight, scale=scale), quantizer(weight))
    assert torch.equal(quantizer.encode(weight, scale=scale).decode(), quantizer(weight))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_rounding_again_with_the_stored_scale_changes_nothing(quantizer):
    weight = gaussian(8, 64, seed=2)
    scale, rounded = quantizer.scale(weight), quantizer(weight)
    assert torch.equal(quantizer(rounded, scale=scale), rounded)
    drawn = quantizer(weight, rounding=stochastic(seeded(0)))
    assert torch.equal(quantizer(drawn, scale=scale), drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_rounding_again_with_a_refitted_scale_changes_what_the_table_says(quantizer, dtype):
    weight, law = gaussian(16, 64, seed=3, dtype=dtype), refit(quantizer)
    rounded = quantizer(weight)
    if law.exact:
        assert torch.equal(quantizer(rounded), rounded)
    elif law.steps is not None:
        step = to_blocks(quantizer(rounded) - rounded, quantizer.block).abs() / quantizer.scale(weight).reshape(-1, 1).abs()
        assert float(step.max()) <= law.steps * widest(quantizer.format)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_the_bracket_is_two_neighbouring_values_with_the_clamped_weight_between(quantizer):
    weight = gaussian(8, 64, seed=4)
    bracket = quantizer.bracket(weight)
    assert bool(((bracket.lower <= bracket.x) & (bracket.x <= bracket.upper)).all())
    grid, scale = levels(quantizer, weight)
    lower, x, upper, blocks = (to_blocks(tensor, quantizer.block) for tensor in (*bracket[:3], weight))
    below = torch.searchsorted(grid, lower.contiguous()).clamp(max=grid.shape[1] - 2)
    assert torch.equal(grid.gather(1, below), lower)
    above = grid.gather(1, below + 1)
    # `compute` can round two neighbours to one value
    assert torch.equal(above, upper) if quantizer.compute is None else bool((above <= upper).all())
    outside = (blocks < grid[:, :1]) | (blocks > grid[:, -1:])
    slack = 2 * EPS * max(quantizer.format.high, -quantizer.format.low) * scale
    if quantizer.compute is not None:
        slack = slack + 2 * grid.abs().amax(1, keepdim=True) * torch.finfo(torch.bfloat16).eps
    assert bool(((x - blocks).abs() <= slack)[~outside].all())
    assert torch.equal(x[outside], blocks.clamp(grid[:, :1], grid[:, -1:])[outside])


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_the_closer_end_of_the_bracket_is_the_rounded_weight(quantizer):
    weight = gaussian(8, 64, seed=5)
    bracket, rounded = quantizer.bracket(weight), quantizer(weight)
    assert bool(((rounded == bracket.lower) | (rounded == bracket.upper)).all())
    if quantizer.compute is None:  # with it, the codes are those of the exact products, and the ends are rounded
        tie = (bracket.lower + bracket.upper - 2 * bracket.x).abs() <= 1e-5 * (bracket.upper - bracket.lower)
        assert torch.equal(nearest(bracket)[~tie], rounded[~tie])


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_randomized_rounding_has_the_clamped_weight_as_mean_and_the_bracket_as_variance(quantizer):
    weight, draws = gaussian(4, 64, seed=6), 400
    scale = quantizer.scale(weight)
    many = scale if quantizer.block is None else scale.repeat(draws, 1)
    drawn = quantizer(weight.repeat(draws, 1), scale=many, rounding=stochastic(seeded(7))).reshape(draws, 4, 64).double()
    lower, x, upper = (part.double() for part in quantizer.bracket(weight)[:3])
    spread = (x - lower) * (upper - x)
    fixed = spread == 0
    assert torch.equal(drawn[:, fixed], x[fixed].expand(draws, -1))
    gap = upper - lower
    odds = ((x - lower) / gap)[~fixed]
    off = (drawn - x)[:, ~fixed]
    # sums over independent draws against their exact standard deviations, five sigma
    assert abs(float(off.sum() / (draws * spread.sum()).sqrt())) < 5
    square = off.square().sum() - draws * spread.sum()
    sigma = (draws * odds * (1 - odds) * (1 - 2 * odds).square() * gap[~fixed] ** 4).sum().sqrt()  # variance of a two-point square
    assert abs(float(square / sigma)) < 5
    common = odds * (1 - odds) > 0.05  # there a mean of 400 draws is close to normal; 10 000 of them in all tests: six sigma
    z = off.mean(0) / (spread[~fixed] / draws).sqrt()
    assert float(z[common].abs().max()) < 6


def test_the_floor_rule_of_mx_saturates_where_the_closed_form_says_and_the_other_rule_nowhere():
    weight = gaussian(512, 1024, seed=8)
    share = float((mxfp4(rule="floor").bracket(weight).x != weight).float().mean())
    # A weight beyond 1.5 * 2**k, with the block's maximum below 2**(k + 1), is beyond 6 scales.
    inside = [math.erf(2.0**k / math.sqrt(2)) for k in range(-8, 5)]
    beyond = [math.erf(1.5 * 2.0**k / math.sqrt(2)) for k in range(-8, 4)]
    expected = sum((inside[k + 1] - beyond[k]) * inside[k + 1] ** 31 for k in range(12))
    assert expected == pytest.approx(0.023, abs=0.001)
    assert share == pytest.approx(expected, rel=0.05)  # 12 000 of 524 288 weights, correlated within blocks: 1 % statistical error
    assert torch.equal(mxfp4().bracket(weight).x, weight)
    # e4m3 scales forgive a relative 2**-20, and their two products with the tensor scale a few ulps
    assert bool(((nvfp4().bracket(weight).x - weight).abs() <= 2**-19 * weight.abs()).all())


def test_signed_scales_saturate_on_the_side_that_has_one_level_less():
    weight = gaussian(256, 32, seed=9)
    quantizer = intn(4, levels="full")
    outside = quantizer.bracket(weight).x != weight
    top = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    opposite = weight * top.sign() < 0
    # only beyond 7/8 of the largest weight, on the other side; float rounding of x alone is below 1e-6
    far = (weight.abs() - top.abs() * 7 / 8) > -1e-6
    assert bool((opposite & far)[outside].all())
    assert 0 < float(outside.float().mean()) < 0.02


@pytest.mark.parametrize("block", [16, "channel", None])
@pytest.mark.parametrize("levels", ["symmetric", "full", "mid"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_weight_of_a_block_stays_to_one_ulp(bits, levels, block):
    weight = gaussian(64, 32, seed=bits)
    quantizer = intn(bits, levels=levels, block=block)
    for rounded in (quantizer(weight), quantizer(weight, rounding=stochastic(seeded(0)))):
        before, after = to_blocks(weight, block), to_blocks(rounded, block)
        where = before.abs().argmax(1, keepdim=True)
        top, kept = before.gather(1, where), after.gather(1, where)
        ulp = torch.nextafter(top.abs(), torch.tensor(torch.inf)) - top.abs()
        assert bool(((kept - top).abs() <= ulp).all())


@pytest.mark.parametrize("power", [-9, -1, 3])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_powers_of_two_pass_through(quantizer, power):
    if isinstance(quantizer.rule, float):
        pytest.skip("a fixed scale does not follow the weights")
    # the law holds while scales are normal numbers: float16 ones are brought near 1 first
    size = 2.0 ** round(math.log2(quantizer.format.edge)) if quantizer.scale_dtype == "fp16" else 1.0
    weight, factor = gaussian(8, 64, seed=10) * size, 2.0**power
    assert torch.equal(quantizer(weight * factor), quantizer(weight) * factor)
    assert torch.equal(quantizer.encode(weight * factor).codes, quantizer.encode(weight).codes)
    one, two = quantizer.bracket(weight), quantizer.bracket(weight * factor)
    assert all(torch.equal(a * factor, b) for a, b in zip(one[:3], two[:3], strict=True))


def test_penalties_are_the_reference_rows():
    # from the project's LOTION notes: P = 1/2 sum g variance, for one hand-made block of eight
    weight = torch.tensor([0.03, -0.11, 0.26, -0.5, 0.74, 1, -0.87, 0.42], dtype=torch.float64)[None]
    curvature = torch.tensor([1, 0.5, 2, 4, 0.25, 3, 1.5, 0.75], dtype=torch.float64)

    def penalty(quantizer: Quantizer) -> float:
        return float((curvature * variance(quantizer.bracket(weight))).sum() / 2)

    assert penalty(int4(block=None)) == pytest.approx(0.017874489795918377, rel=1e-9)
    assert penalty(int3(block=None)) == pytest.approx(0.115538888888889, rel=1e-9)
    assert penalty(int2(block=None)) == pytest.approx(0.93165, rel=1e-9)
    assert penalty(int8(block=None)) == pytest.approx(5.4426808853617816e-05, rel=1e-9)
    assert penalty(int4(block=4)) == pytest.approx(0.0041755102040816425, rel=1e-9)
    assert penalty(fp4(block=None)) == pytest.approx(0.026719444444444438, rel=1e-9)
    assert float(variance(fp4(block=None).bracket(weight)).sum()) == pytest.approx(0.056277777777777774, rel=1e-9)


@pytest.mark.parametrize(
    ("quantizer", "weight", "expected"),
    [
        # ties go to the even code, in codes: under a negative scale too
        (int4(block=None), [7, 0.5, 1.5, -2.5, 3.5], [7, 0, 2, -2, 4]),
        (intn(4, block=None, levels="full"), [8, 0.5, 1.5, -2.5, 9 - 8.5], [8, 0, 2, -2, 0]),
        (intn(2, block=None, levels="mid"), [1.5, 0, 1, -1, 0.1], [1.5, 0.5, 0.5, -1.5, 0.5]),
        (fp4(block=None), [6, 0.25, 0.75, 2.5, 5, -3.5], [6, 0, 1, 2, 4, -4]),
        (intn(2, block=None, levels="affine"), [0, 3, 0.5, 1.5, 2.5], [0, 3, 0, 2, 2]),
        (intn(4, block=None, scale=0.5), [0.3, 9, -9, 0.25], [0.5, 3.5, -3.5, 0]),
    ],
    ids=str,
)
def test_rounding_by_hand(quantizer, weight, expected):
    weight = torch.tensor([weight], dtype=torch.float32)
    assert quantizer(weight).tolist() == [expected]
    assert nearest(quantizer.bracket(weight)).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_half_weights_are_rounded_in_float32_and_cast_once(quantizer, dtype):
    weight = gaussian(8, 64, seed=11).to(dtype)
    assert torch.equal(quantizer(weight), quantizer(weight.float()).to(dtype))
    assert torch.equal(quantizer.encode(weight).decode().to(dtype), quantizer(weight))
    bracket = quantizer.bracket(weight)
    assert bracket.x.dtype == dtype
    assert bool(((bracket.lower <= bracket.x) & (bracket.x <= bracket.upper)).all())


@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_memory_layout_does_not_matter_and_nothing_given_is_changed(quantizer):
    weight = gaussian(8, 64, seed=12)
    kept, strided = weight.clone(), torch.empty(64, 16).t()[::2].copy_(weight)
    assert not strided.is_contiguous()
    assert torch.equal(quantizer(strided), quantizer(weight))
    assert torch.equal(quantizer.encode(strided).codes, quantizer.encode(weight).codes)
    assert torch.equal(weight, kept)
    assert not quantizer(weight.requires_grad_()).requires_grad
