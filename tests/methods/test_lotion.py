"""LOTION in the open: numbers worked out by hand, autograd through the bracket, and the expectation over all roundings."""

import math
from itertools import product

import pytest
import torch
from tests.cases import QUANTIZERS, gaussian, seeded
from tests.reference.lotion import penalty as slow_penalty
from tests.reference.lotion import roundings
from tests.reference.relatives import levels
from tests.reference.relatives import prox as slow_prox

import stepwell as sw
from stepwell.blocks import to_blocks
from stepwell.methods import lotion

W = torch.tensor([0.03, -0.11, 0.26, -0.5, 0.74, 1, -0.87, 0.42], dtype=torch.float64)
G = torch.tensor([1, 0.5, 2, 4, 0.25, 3, 1.5, 0.75], dtype=torch.float64)
FP4_SIXTH = sw.fp4(block=None)  # the largest weight is 1, so the scale is 1/6


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        (sw.int4(block=None), 0.017874489795918377),
        (sw.int3(block=None), 0.115538888888889),
        (sw.int2(block=None), 0.93165),
        (sw.int8(block=None), 5.4426808853617816e-05),
        (sw.int4(block=4), 0.0041755102040816425),
        (FP4_SIXTH, 0.026719444444444438),
    ],
    ids=str,
)
def test_penalty_of_eight_weights(quantizer, expected):
    assert lotion.penalty(W, G, quantizer).item() == pytest.approx(expected, rel=1e-9)


def test_scales_and_variance_of_eight_weights():
    assert sw.int4(block=4).scale(W).flatten().tolist() == pytest.approx([1 / 14, 1 / 7], rel=1e-12)
    assert sw.variance(FP4_SIXTH.bracket(W)).sum().item() == pytest.approx(0.056277777777777774, rel=1e-9)


def test_force_of_eight_weights_vanishes_at_the_tie_and_on_the_grid():
    force = lotion.penalty_gradient(W, G, sw.int4(block=None), through_scale=False)
    expected = [0.0414285714, 0.0192857143, -0.0914285714, 0, 0.0114285714, 0, -0.0878571429, -0.0471428571]
    assert force.tolist() == pytest.approx(expected, abs=5e-11)  # ten digits are given
    assert force[5].item() == 0  # on the grid exactly: the subgradient is zero, not rounding error


def test_derivative_through_the_maximum_is_the_total_one():
    quantizer, step = sw.int4(block=None), torch.zeros(8, dtype=torch.float64)
    force = lotion.penalty_gradient(W, G, quantizer)
    assert force[5].item() == pytest.approx(-0.004693877551, abs=5e-13)  # twelve digits are given
    step[5] = 1e-6
    slope = (lotion.penalty(W + step, G, quantizer) - lotion.penalty(W - step, G, quantizer)) / 2e-6
    assert force[5].item() == pytest.approx(slope.item(), abs=1e-9)  # central difference: error of order 1e-12 / 1e-6 from rounding


@pytest.mark.parametrize(
    ("bits", "expected"), [(4, 0.018666666667), (3, 0.039777777778), (2, 0.368666666667)]
)  # twelve digits are given in each row below
def test_smoothed_loss_of_a_dense_quadratic(bits, expected):
    place = torch.arange(5, dtype=torch.float64)
    hessian = 1 / (1 + (place[:, None] - place).abs())
    target = torch.tensor([0.9, -0.4, 0.3, 0.05, -0.7], dtype=torch.float64)
    weight = torch.tensor([1, -0.37, 0.22, 0.1, -0.66], dtype=torch.float64)
    quantizer = sw.intn(bits, block=None)

    def loss(w):
        return (w - target) @ hessian @ (w - target) / 2

    assert loss(weight).item() == pytest.approx(0.00911666666666666, rel=1e-12)
    smoothed = loss(weight) + lotion.penalty(weight, hessian.diagonal(), quantizer)
    assert smoothed.item() == pytest.approx(expected, abs=5e-13)
    if bits == 4:
        assert loss(quantizer(weight)).item() == pytest.approx(0.008217687075, abs=5e-13)


@pytest.mark.parametrize("quantizer", [sw.int2(block=6), sw.int4(block=3), sw.intn(3, block=6, levels="full"), sw.fp4(block=2)], ids=str)
def test_smoothed_loss_is_the_mean_over_all_roundings(quantizer):
    random = gaussian(6, 6, seed=1, dtype=torch.float64)
    hessian, weight = random @ random.T, gaussian(1, 6, seed=2, dtype=torch.float64)[0]
    target = gaussian(1, 6, seed=3, dtype=torch.float64)[0]

    def loss(w):
        return ((w - target) @ hessian @ (w - target) / 2).item()

    bracket = quantizer.bracket(weight)
    drawn = list(roundings(bracket.lower, bracket.x, bracket.upper))
    assert sum(odds for odds, _ in drawn) == pytest.approx(1, abs=1e-12)
    mean = sum(odds * loss(rounded) for odds, rounded in drawn)
    # "full" grids clip what lies opposite to their signed maximum: the mean is then around the clamped weight
    smoothed = loss(bracket.x) + lotion.penalty(weight, hessian.diagonal(), quantizer).item()
    assert smoothed == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("through_scale", [True, False], ids=["through scale", "scale detached"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_closed_form_is_autograd_through_the_bracket(quantizer, through_scale):
    weight, curvature = gaussian(8, 128, seed=4, dtype=torch.float64), gaussian(8, 128, seed=5, dtype=torch.float64).square()
    rows, terms = (to_blocks(part, quantizer.block, quantizer.axis) for part in (weight, curvature))
    rows = rows.clone().requires_grad_()
    (slow,) = torch.autograd.grad(slow_penalty(rows, terms, quantizer, through_scale=through_scale), rows)
    fast = to_blocks(lotion.penalty_gradient(weight, curvature, quantizer, through_scale), quantizer.block, quantizer.axis)
    moves = through_scale and quantizer.rule == "absmax" and quantizer.scale_dtype in ("fp32", "fp16", "bf16")
    differentiable = torch.ones_like(rows, dtype=torch.bool) if moves else off_grid(rows.detach(), quantizer)
    assert differentiable.double().mean() > 0.9
    # every element is a sum over at most 1024 products of size one, in another order: 1024 * 2**-53 = 1.1e-13
    torch.testing.assert_close(fast[differentiable], slow[differentiable], rtol=1e-12, atol=1e-12)
    assert (fast[~differentiable] == 0).all()


def off_grid(rows, quantizer):
    """Where a weight is not on a grid value to 1e-9 of its scale; there the penalty has no derivative unless the scale moves along."""
    fit = quantizer.local().fit(rows)
    units, values = fit.to_units(rows), torch.tensor(quantizer.format.values, dtype=torch.float64)
    return ((units[..., None] - values).abs() > 1e-9).all(-1)


def test_force_descends_to_the_nearest_grid_value():
    weight = gaussian(4, 64, seed=6, dtype=torch.float64)
    quantizer = sw.int4(block=32)
    force = lotion.penalty_gradient(weight, torch.ones_like(weight), quantizer, through_scale=False)
    towards = quantizer(weight) - weight
    moved = force != 0
    assert moved.sum() == weight.numel() - 8  # all but the maximum of each of the eight blocks
    assert (torch.sign(-force) == torch.sign(towards))[moved].all()


@pytest.mark.parametrize("strength", [0.3, 30.0])
def test_prox_minimizes_within_the_cell(strength):
    quantizer, lr = sw.int3(block=8), 0.2
    weight, curvature = gaussian(2, 8, seed=7, dtype=torch.float64), gaussian(2, 8, seed=8, dtype=torch.float64).abs()
    bracket, found = quantizer.bracket(weight), lotion.prox(weight, curvature, quantizer, strength=strength, lr=lr)
    share = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None, None]
    trial = bracket.lower + share * (bracket.upper - bracket.lower)
    cost = (trial - weight) ** 2 / (2 * lr) + strength * curvature / 2 * (trial - bracket.lower) * (bracket.upper - trial)
    best = trial.gather(0, cost.argmin(0, keepdim=True))[0]
    gap = bracket.upper - bracket.lower
    assert ((found - best).abs() <= gap / 20000).all()  # the trial points are that far apart
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("strength", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("quantizer", [sw.int3(block=8), sw.intn(2, block=8, levels="full"), sw.fp4(block=8)], ids=str)
def test_prox_equals_brute_force(quantizer, strength):
    """To 1e-8 of weights of order one, by bisection in each cell."""
    weight, curvature = gaussian(3, 8, seed=17, dtype=torch.float64), gaussian(3, 8, seed=18, dtype=torch.float64).square()
    found, scales = lotion.prox(weight, curvature, quantizer, strength=strength, lr=0.2), quantizer.scale(weight)
    for row, column in product(range(3), range(8)):
        g = curvature[row, column].item()
        if abs(strength * 0.2 * g - 1) > 1e-3:  # else nearly flat: the minimum is not determined to 1e-8
            expected = slow_prox(weight[row, column].item(), g, levels(quantizer, scales[row, 0].item()), strength, 0.2)
            assert found[row, column].item() == pytest.approx(expected, abs=1e-8)


def test_prox_takes_a_learning_rate_per_weight_and_snaps_at_one():
    weight, quantizer = gaussian(2, 8, seed=9, dtype=torch.float64), sw.int4(block=8)
    rates = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 8)
    moved = lotion.prox(weight, torch.ones_like(weight), quantizer, strength=1.0, lr=rates)
    torch.testing.assert_close(moved[0], weight[0], rtol=0, atol=1e-15)
    assert torch.equal(moved[1], quantizer(weight)[1])


def test_all_zero_block_has_no_penalty_and_no_force():
    weight, quantizer = torch.zeros(2, 32), sw.int4()
    weight[1] = gaussian(1, 32, seed=10)
    curvature = torch.ones_like(weight)
    assert torch.equal(lotion.penalty_gradient(weight, curvature, quantizer)[0], torch.zeros(32))
    assert lotion.penalty(weight, curvature, quantizer) == lotion.penalty(weight[1:], curvature[1:], quantizer)
    assert torch.equal(lotion.prox(weight, curvature, quantizer)[0], torch.zeros(32))


def test_float32_maxima_feel_no_force_in_their_cell_at_any_width():
    # The quotient maximum / scale may miss its code by an ulp; an untreated kink would push it with the full force g s / 2.
    weight = torch.randn(512, 32, generator=seeded(11))
    for bits in range(2, 9):
        quantizer = sw.intn(bits)
        force = lotion.penalty_gradient(weight, torch.ones_like(weight), quantizer, through_scale=False)
        top = weight.abs().argmax(1, keepdim=True)
        assert (force.gather(1, top) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "`strength`"),
        ({"strength": math.nan}, "`strength`"),
        ({"loss_terms": 0}, "`loss_terms`"),
        ({"loss_terms": math.inf}, "`loss_terms`"),
        ({"loss_terms": True}, "`loss_terms`"),
        ({"forward": "rounded"}, "`forward`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sw.lotion(sw.int4(), **arguments)


def test_method_needs_a_quantizer():
    with pytest.raises(TypeError, match=r"`quantizer` must be a Quantizer.*got int 4"):
        sw.lotion(4)
