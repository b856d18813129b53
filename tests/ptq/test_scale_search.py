"""Searched scales against brute force over many scales, and what they must keep: shapes, dtypes, signs, ties to the rule they replace."""

import pytest
import torch
from tests.cases import REPRESENTATIVES, gaussian, seeded

import stepwell as sw
from stepwell.blocks import to_blocks
from stepwell.ptq.exact_scale import has_exact_scale

EXACT = tuple(q for q in REPRESENTATIVES if has_exact_scale(torch.empty(1, 64), q))


def costs(quantizer: sw.Quantizer, weight: torch.Tensor, curvature: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of every block, `(blocks,)`."""
    return to_blocks(curvature * (weight - quantizer(weight, scale=scale)) ** 2, quantizer.block, quantizer.axis).sum(1)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    weight = gaussian(4, 64, seed=0, dtype=torch.float64)
    return weight, torch.rand(4, 64, generator=seeded(1), dtype=torch.float64)


def brute(quantizer: sw.Quantizer, weight: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """The least error of every block over scales 0.2 % of absmax apart, of both signs where the grid has them."""
    # powers of two may be rounded down, so that twice absmax is within reach
    highest = 1201 if quantizer.scale_dtype == "e8m0" else 601
    signs = (1, -1) if quantizer.format.levels == "full" else (1,)
    start = sw.Quantizer(quantizer.format, quantizer.block, axis=quantizer.axis, zero=quantizer.zero).scale(weight)
    tried = [costs(quantizer, weight, curvature, sign * k / 500 * start) for k in range(60, highest) for sign in signs]
    return torch.stack(tried).amin(0)


@pytest.mark.parametrize("quantizer", EXACT, ids=str)
def test_exact_scale_is_never_beaten(quantizer):
    weight, curvature = example()
    found = costs(quantizer, weight, curvature, sw.ptq.exact_scale(weight, quantizer, curvature))
    least = brute(quantizer, weight, curvature)
    assert (found <= least * (1 + 1e-9)).all()
    # the brute grid is 0.2 % of absmax apart, so it comes close; between its points it can miss a good assignment of codes
    assert found.sum() > 0.9 * least.sum()


@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_search_beats_the_rules_and_keeps_what_a_scale_must_be(quantizer):
    weight, curvature = example()
    scale = sw.ptq.scale_search(weight, quantizer, curvature)
    fitted = quantizer.scale(weight)
    assert scale.shape == fitted.shape
    assert scale.dtype == fitted.dtype
    assert torch.equal(quantizer.encode(weight, scale=scale).decode(), quantizer(weight, scale=scale))
    stored = quantizer.prepare(weight, scale)[1].scale.reshape(scale.shape)
    assert torch.equal(stored, scale)
    found = costs(quantizer, weight, curvature, scale)
    absmax = costs(quantizer, weight, curvature, sw.Quantizer(quantizer.format, quantizer.block, zero=quantizer.zero).scale(weight))
    assert found.sum() <= absmax.sum()
    if quantizer.rule == "mse" and quantizer.scale_dtype != "e4m3":
        plain = torch.ones_like(weight)
        searched = sw.ptq.scale_search(weight, quantizer)
        assert costs(quantizer, weight, plain, searched).sum() <= 1.02 * costs(quantizer, weight, plain, fitted).sum()


@pytest.mark.parametrize("quantizer", [sw.int8(), sw.intn(4, levels="affine"), sw.intn(4, compute="bf16"), sw.fp8()], ids=str)
def test_search_by_factors_comes_close_to_brute_force(quantizer):
    """65 factors and three rounds of least squares against 541 factors: on fine grids the best of many is luck, worth some per cent."""
    weight, curvature = example()
    found = costs(quantizer, weight, curvature, sw.ptq.scale_search(weight, quantizer, curvature))
    assert found.sum() < 1.6 * brute(quantizer, weight, curvature).sum()


def test_curvature_decides_which_weight_is_kept():
    weight = torch.tensor([[1.0, 0.5, 0.5, 0.5]])
    # least squares by hand: all four on code 1 is s = 2.5 / 4; only the first counts: s = 1
    assert sw.ptq.scale_search(weight, sw.int2(block=4)).item() == pytest.approx(0.625)
    assert sw.ptq.scale_search(weight, sw.int2(block=4), torch.tensor([[1.0, 0, 0, 0]])).item() == pytest.approx(1.0)


def test_weights_on_a_grid_stay_there():
    for quantizer in (sw.int4(block=16), sw.int8(block=16), sw.intn(3, block=16, levels="full"), sw.fp4(block=16)):
        weight = quantizer(gaussian(8, 64, seed=2, dtype=torch.float64))
        scale = sw.ptq.scale_search(weight, quantizer)
        assert torch.allclose(quantizer(weight, scale=scale), weight, rtol=1e-12, atol=0), quantizer


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_tiny_and_huge_weights_neither_underflow_nor_overflow(factor):
    weight = gaussian(4, 64, seed=3)
    for quantizer in (sw.int3(), sw.intn(3, levels="affine"), sw.int8()):
        plain = sw.ptq.scale_search(weight, quantizer)
        assert torch.equal(sw.ptq.scale_search(weight * factor, quantizer), plain * factor), quantizer


def test_blocks_without_weight_or_curvature_are_left_to_the_rule():
    weight, curvature = example()
    weight[0], curvature[1] = 0, 0
    for quantizer in (sw.int4(block=64), sw.int8(block=64)):
        scale = sw.ptq.scale_search(weight, quantizer, curvature)
        assert scale[0].item() == 0
        assert scale[1].item() > 0
        assert scale.isfinite().all()


def test_half_precision_weights_are_searched_in_float32():
    weight = gaussian(4, 64, seed=4).to(torch.bfloat16)
    assert torch.equal(sw.ptq.scale_search(weight, sw.int4()), sw.ptq.scale_search(weight.float(), sw.int4()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: sw.ptq.scale_search(w, sw.int4(), torch.ones(3, 64)), r"`curvature`.*\(4, 64\).*\(3, 64\)"),
        (lambda w: sw.ptq.scale_search(w, sw.int4(), -torch.ones(4, 64)), "`curvature`.*-1"),
        (lambda w: sw.ptq.scale_search(w, sw.int4(), torch.full((4, 64), torch.nan)), "`curvature`.*nan"),
        (lambda w: sw.ptq.scale_search(w * torch.inf, sw.int4()), "`weight`.*inf"),
        (lambda w: sw.ptq.scale_search(w, sw.int4(block=48)), "`block`.*48"),
        (lambda w: sw.ptq.exact_scale(w, sw.intn(4, levels="affine")), "`quantizer`.*int4/affine"),
        (lambda w: sw.ptq.exact_scale(w, sw.nvfp4()), "`quantizer`.*e4m3"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(gaussian(4, 64, seed=5))
