"""The testbeds: printed rows, enumeration of every rounding, brute force over scales, and derivatives by autograd."""

import math
from itertools import product

import pytest
import torch

import stepwell as sw
from stepwell.testbed import TwoLayer, cosines

TENSOR4, TENSOR3, BLOCK4 = sw.intn(4, block=None), sw.intn(3, block=None), sw.intn(4, block=128)


def every_rounding(bracket: sw.Bracket):
    """Every outcome of randomized rounding and its probability, `(dim,)` each."""
    gap = bracket.upper - bracket.lower
    up = torch.where(gap > 0, (bracket.x - bracket.lower) / gap.masked_fill(gap == 0, 1), 0.0)
    for choice in product((False, True), repeat=bracket.x.numel()):
        chosen = torch.tensor(choice).reshape(bracket.x.shape)
        yield torch.where(chosen, bracket.upper, bracket.lower), torch.where(chosen, up, 1 - up).prod().item()


# rows


def test_the_target_and_the_loss_at_zero():
    t = sw.Testbed(dim=12000, exponent=1.1)
    assert t.target[:4].tolist() == pytest.approx([0.30032138539, -0.719008057669, 1.054189715884, -0.069901687484], abs=1e-12)
    assert t.loss(torch.zeros(12000)).item() == pytest.approx(2.648432, abs=1e-6)
    assert t.loss(t.target).item() == 0
    assert t.hessian_diagonal[:2].tolist() == pytest.approx([1, 2**-1.1], rel=1e-15)


@pytest.mark.parametrize(
    ("quantizer", "rtn", "randomized", "optimum"),
    [
        (TENSOR4, 0.10307002032516899, 0.1871791075791806, 0.0288957),
        (TENSOR3, 0.47532, 0.97339, 0.14159),
        (BLOCK4, 0.03620, 0.07859, 0.02799),
    ],
    ids=str,
)
def test_rows_of_the_diagonal_testbed(quantizer, rtn, randomized, optimum):
    t, printed = sw.Testbed(), 1e-9 if quantizer == TENSOR4 else 1e-5
    assert t.loss(t.rtn(quantizer)).item() == pytest.approx(rtn, abs=printed)
    assert t.smoothed(t.target, quantizer).item() == pytest.approx(randomized, abs=printed)
    # the row was found on a grid of scales, so it may lie above the optimum by 1e-5 of itself
    assert t.loss(t.optimum(quantizer)).item() == pytest.approx(optimum, rel=1e-5, abs=6e-6)


@pytest.mark.parametrize(
    ("quantizer", "gptq", "descent", "rtn", "randomized"),
    [(TENSOR4, 0.01439, 0.01781, 0.02057, 0.10454), (TENSOR3, 0.07431, 0.09446, 0.11941, 0.56811)],
    ids=str,
)
def test_rows_of_the_rotated_testbed(quantizer, gptq, descent, rtn, randomized):
    t = sw.Testbed(dim=1024, exponent=1.1, rotated=True)
    rounded = t.gptq(quantizer)
    assert t.loss(rounded).item() == pytest.approx(gptq, abs=6e-6)
    assert t.loss(t.rtn(quantizer)).item() == pytest.approx(rtn, abs=6e-6)
    assert t.smoothed(t.target, quantizer).item() == pytest.approx(randomized, abs=6e-6)
    assert t.loss(t.one_opt(quantizer)).item() == pytest.approx(descent, abs=6e-6)
    assert torch.equal(t.one_opt(quantizer, rounded), rounded)


def test_randomized_rounding_of_the_target_costs_this_much_more_than_the_optimum_at_its_scale():
    t = sw.Testbed(dim=2000)
    assert (t.smoothed(t.target, TENSOR4) / t.loss(t.rtn(TENSOR4))).item() == pytest.approx(1.864, abs=1e-3)


# exactness


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    "quantizer", [TENSOR3, sw.intn(2, block=4, levels="full"), sw.fp4(block=8), sw.intn(4, block=None, scale=0.05)], ids=str
)
def test_smoothed_is_the_mean_over_every_rounding(rotated, quantizer):
    t = sw.Testbed(dim=8, exponent=0.7, rotated=rotated)
    weight = 0.9 * t.target + 0.1
    mean = sum(chance * t.loss(outcome).item() for outcome, chance in every_rounding(quantizer.bracket(weight)))
    assert t.smoothed(weight, quantizer).item() == pytest.approx(mean, rel=1e-12)


def test_rotation_is_by_the_cosine_basis():
    t, d = sw.Testbed(dim=11, exponent=1.3, rotated=True), 11
    basis = torch.tensor(
        [[math.sqrt((1 if k == 0 else 2) / d) * math.cos(math.pi * (i + 0.5) * k / d) for i in range(d)] for k in range(d)],
        dtype=torch.float64,
    )
    hessian = basis.T @ torch.diag(t.spectrum) @ basis
    assert torch.allclose(t.hessian, hessian, rtol=0, atol=1e-14)
    assert torch.allclose(t.hessian_diagonal, hessian.diagonal(), rtol=0, atol=1e-14)
    weight = torch.linspace(-1, 1, d, dtype=torch.float64)
    error = weight - t.target
    assert t.loss(weight).item() == pytest.approx((error @ hessian @ error / 2).item(), rel=1e-13)
    assert torch.allclose(cosines(torch.eye(d, dtype=torch.float64)).T, basis, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_loss_has_the_hessian_as_second_derivative(rotated):
    t = sw.Testbed(dim=7, rotated=rotated)
    second = torch.autograd.functional.hessian(t.loss, torch.ones(7, dtype=torch.float64))
    assert torch.allclose(second, t.hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "quantizer",
    [TENSOR4, sw.intn(4, block=50), sw.int2(block=None), sw.ternary(block=25), sw.intn(3, block=None, levels="full"), sw.fp4(block=40)],
    ids=str,
)
@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_no_scale_beats_the_optimum(quantizer, exponent):
    t = sw.Testbed(dim=200, exponent=exponent)
    best, fitted = t.optimum(quantizer), quantizer.scale(t.target)
    signs = (1, -1) if quantizer.format.levels == "full" else (1,)
    shape = (-1, quantizer.block or 200)

    def costs(weight):
        return (t.spectrum * (weight - t.target) ** 2).reshape(shape).sum(1) / 2

    tried = torch.stack([costs(quantizer(t.target, scale=k / 800 * sign * fitted)) for k in range(80, 1000) for sign in signs])
    assert (costs(best) <= tried.amin(0) * (1 + 1e-12)).all()
    # 0.125 % between scales: at the optimum a parabola, so a fine grid comes close; a block may have one weight that matters
    assert t.loss(best).item() > 0.9 * tried.amin(0).sum().item() - 1e-6


def test_a_short_last_block_has_its_own_scale():
    t, quantizer = sw.Testbed(dim=70), sw.intn(4, block=32)
    parts = [sw.intn(4, block=None)(part) for part in t.target.split(32)]
    assert torch.equal(t.rtn(quantizer), torch.cat(parts))
    assert t.optimum(quantizer).shape == t.gptq(quantizer).shape == (70,)
    turned = sw.Testbed(dim=70, rotated=True)
    assert turned.loss(turned.gptq(quantizer)) < turned.loss(turned.rtn(quantizer))
    assert turned.smoothed(turned.target, quantizer) > turned.loss(turned.rtn(quantizer))


def test_one_opt_leaves_no_single_change_that_helps():
    t, quantizer = sw.Testbed(dim=40, exponent=1.5, rotated=True), sw.intn(3, block=20)
    found = t.one_opt(quantizer)
    scale = quantizer.scale(t.target).repeat_interleave(20)
    for i, code in product(range(40), quantizer.format.values):
        other = found.clone()
        other[i] = code * scale[i]
        assert t.loss(other) >= t.loss(found) * (1 - 1e-12)
    assert t.loss(found) <= t.loss(t.rtn(quantizer))


def test_on_a_diagonal_hessian_sequential_rounding_is_rounding_to_nearest():
    t = sw.Testbed(dim=96)
    assert torch.equal(t.gptq(sw.int4()), t.rtn(sw.int4()))
    assert torch.equal(t.one_opt(sw.int4()), t.rtn(sw.int4()))
    assert t.loss(t.optimum(sw.int4())) < t.loss(t.rtn(sw.int4()))


# two layers


def network(width: int, dim: int) -> tuple[TwoLayer, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    outer, inner = torch.randn(width, generator=generator), torch.randn(width, dim, generator=generator)
    return TwoLayer(width, dim=dim, exponent=1.1), outer.double(), inner.double()


def test_two_layer_smoothed_is_the_mean_over_every_rounding():
    net, outer, inner = network(3, 2)
    for quantizer in (sw.intn(3, block=None), sw.intn(4, block=None, scale=0.2)):
        mean = sum(
            chance * other * net.loss(u, v).item()
            for u, chance in every_rounding(quantizer.bracket(outer))
            for v, other in every_rounding(quantizer.bracket(inner))
        )
        assert net.smoothed(outer, inner, quantizer).item() == pytest.approx(mean, rel=1e-12)


def test_two_layer_gauss_newton_is_that_of_the_jacobian():
    net, outer, inner = network(3, 5)
    by_outer, by_inner = torch.autograd.functional.jacobian(lambda u, v: u @ v / 3, (outer, inner))
    u, v = net.gauss_newton(outer, inner)
    assert torch.allclose(u, net.spectrum @ by_outer**2, rtol=1e-13)
    assert torch.allclose(v, torch.einsum("i,ijk->jk", net.spectrum, by_inner**2), rtol=1e-13)


def test_one_hidden_unit_is_the_plain_testbed():
    net, t = TwoLayer(1, dim=30), sw.Testbed(dim=30)
    weight = torch.linspace(-1, 1, 30, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert net.loss(one, weight[None]).item() == pytest.approx(t.loss(weight).item(), rel=1e-14)
    # a single weight is the maximum of its block: it stays on its code and adds no noise
    assert net.smoothed(one, weight[None], TENSOR4).item() == pytest.approx(t.smoothed(weight, TENSOR4).item(), rel=1e-13)


def test_a_shift_is_another_draw_of_the_same_target():
    t = sw.Testbed(dim=4000, shift=0.25)
    assert t.target[0].item() == pytest.approx(torch.special.ndtri(torch.tensor(0.868033988749895, dtype=torch.float64)).item(), rel=1e-12)
    assert not torch.equal(t.target, sw.Testbed(dim=4000).target)
    # the points fill the unit interval evenly, with a discrepancy of order log d / d, whatever the shift: mean 0 and variance 1
    assert t.target.mean().item() == pytest.approx(0, abs=0.01)
    assert t.target.var().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(TwoLayer(3, dim=4000, shift=0.25).target, t.target)


def test_smoothed_takes_the_scales_that_are_stored():
    t = sw.Testbed(dim=6, exponent=0.7)
    scale = sw.ptq.scale_search(t.target, TENSOR3, t.hessian_diagonal)
    bracket = TENSOR3.bracket(t.target, scale=scale)
    mean = sum(chance * t.loss(outcome).item() for outcome, chance in every_rounding(bracket))
    assert t.smoothed(t.target, TENSOR3, scale=scale).item() == pytest.approx(mean, rel=1e-12)
    assert t.smoothed(t.target, TENSOR3, scale=scale).item() != pytest.approx(t.smoothed(t.target, TENSOR3).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sw.Testbed(shift=-0.5), "`shift`.*-0.5"),
        (lambda: TwoLayer(2, shift=math.inf), "`shift`.*inf"),
        (lambda: sw.Testbed(dim=0), "`dim`.*0"),
        (lambda: sw.Testbed(dim=1.5), "`dim`.*1.5"),
        (lambda: sw.Testbed(exponent=math.nan), "`exponent`.*nan"),
        (lambda: sw.Testbed(exponent=-1), "`exponent`.*-1"),
        (lambda: sw.Testbed(dim=8).loss(torch.zeros(9)), r"`weight`.*\(8,\).*\[9\]"),
        (lambda: sw.Testbed(dim=8, rotated=True).optimum(TENSOR4), "`rotated`.*True"),
        (lambda: sw.Testbed(dim=16).optimum(sw.nvfp4()), "`quantizer`.*e4m3"),
        (lambda: sw.Testbed(dim=20_000, rotated=True).gptq(TENSOR4), "`dim`.*20000"),
        (lambda: TwoLayer(0), "`width`.*0"),
        (lambda: TwoLayer(2, dim=3).loss(torch.zeros(2), torch.zeros(3, 2)), r"`outer` and `inner`.*\(3, 2\)"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
