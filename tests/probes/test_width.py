"""Widths and grid-to-basin ratios, against quadratics where they are known, and under rescaling of layers."""

import math

import pytest
import torch
from tests.probes.models import UNIT, Quadratic, normal, positive, row
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.probes.directions import axes, gaussian_noise, keys, uniform_noise
from stepwell.probes.points import place
from stepwell.probes.stage import staged
from stepwell.probes.width import along

# Growth by 1.5 leaves an interval half as long as its lower end, 8 halvings a 256th of that; the middle is off by at most half of it.
RESOLUTION = 1 / 2 / 256 / 2


def isotropic(size: int, curvature: float, seed: int):
    """Weights at the minimum of curvature/2 |w - c|^2."""
    centre = 2 * normal(size, seed=seed)
    return row(centre), Quadratic(curvature * torch.eye(size), centre)


@pytest.mark.parametrize("seed", range(5))
def test_width_at_the_minimum_of_a_quadratic(seed):
    size, tolerance = 7, 0.3
    hessian, centre, direction = positive(size, seed), normal(size, seed=10 + seed), normal(size, seed=20 + seed)
    found = sw.probes.width(row(centre), Quadratic(hessian, centre), toward={"weight": (centre + direction)[None]}, tolerance=tolerance)
    exact = math.sqrt(2 * tolerance / (direction @ hessian @ direction))
    assert abs(found.value - exact) <= found.error * (1 + 1e-9)
    assert found.value == pytest.approx(exact, rel=RESOLUTION)
    assert found.length == pytest.approx(direction.norm().item())
    assert found.radius == pytest.approx(found.value * found.length)
    assert 10 <= found.cost.forward <= 31


def test_width_at_a_slope():
    # x + x^2 along x = 2t: 2t + 4t^2 = 0.5 at t = (-2 + sqrt(4 + 8)) / 8
    found = sw.probes.width(row([0.0]), lambda m: (m.weight + m.weight**2).sum(), toward={"weight": torch.full((1, 1), 2.0)}, tolerance=0.5)
    assert found.value == pytest.approx((math.sqrt(12) - 2) / 8, rel=RESOLUTION)


def test_first_crossing_counts_even_if_the_loss_comes_back():
    bump = lambda m: torch.exp(-10 * (m.weight - 1).square()).sum()  # noqa: E731  # above .1 between .52 and 1.48 only
    found = sw.probes.width(row([0.0]), bump, toward={"weight": torch.full((1, 1), 4.0)}, tolerance=0.1)
    exact = 1 - math.sqrt(-math.log(0.1 + math.exp(-10)) / 10)
    assert 4 * found.value == pytest.approx(exact, rel=RESOLUTION)


@pytest.mark.parametrize("guess", [1e-9, 0.5, 1.0, 2.0, 50.0, math.inf])
def test_a_search_that_begins_near_a_guess_ends_at_the_same_crossing(guess):
    size, tolerance = 7, 0.3
    hessian, centre, direction = positive(size, 1), normal(size, seed=11), normal(size, seed=21)
    exact = math.sqrt(2 * tolerance / (direction @ hessian @ direction))
    with staged(row(centre), Quadratic(hessian, centre), ["weight"]) as stage:
        found = along(stage, lambda name, base: direction[None], tolerance, near=guess * exact * direction.norm().item())
        usual = along(stage, lambda name, base: direction[None], tolerance)
    assert found.value == pytest.approx(exact, rel=RESOLUTION)
    if 0.5 <= guess <= 2:
        assert found.cost.forward < usual.cost.forward


def test_flat_and_empty_directions():
    flat = sw.probes.width(row([0.3]), lambda m: m.weight.sum() * 0 + 1, toward=UNIT)
    assert (flat.value, flat.capped) == (64.0, True)
    none = sw.probes.width(row([2.0]), Quadratic(torch.eye(1), torch.zeros(1)), toward=UNIT)
    assert (none.value, none.length, none.ratio, none.radius) == (math.inf, 0.0, 0.0, math.inf)
    assert none.cost.forward == 2


def test_overflow_on_the_way_is_outside():
    found = sw.probes.width(row([0.0]), lambda m: -(1 - m.weight).log().sum(), toward={"weight": torch.full((1, 1), 4.0)}, tolerance=0.1)
    assert 4 * found.value == pytest.approx(1 - math.exp(-0.1), rel=RESOLUTION)
    wall = sw.probes.width(row([0.0]), lambda m: (1 - 4 * m.weight).sqrt().sum(), toward={"weight": torch.full((1, 1), 4.0)}, tolerance=0.1)
    assert 4 * wall.value == pytest.approx(0.25, rel=RESOLUTION)  # not a number beyond


@pytest.mark.parametrize("seed", range(12))
def test_rho_self_is_above_one_exactly_where_rounding_fails(seed):
    size, tolerance = 5, 0.25
    centre = 2 * normal(size, seed=seed)
    loss = Quadratic(positive(size, seed), centre)
    ratio = sw.probes.rho_self(row(centre), loss, toward=UNIT, tolerance=tolerance)
    error = UNIT(centre[None])[0] - centre
    increase = float(error @ loss.hessian @ error / 2)
    assert ratio.value == pytest.approx(math.sqrt(increase / tolerance), rel=RESOLUTION / (1 - RESOLUTION))
    assert (ratio.value > 1) == (increase > tolerance)
    assert ratio.tautology
    assert "tautology" in str(ratio)


def test_rho_uniform_of_an_isotropic_quadratic():
    # 1 / r = |xi| sqrt(h / 2 tau), xi uniform in half steps: E |xi|^2 = n / 12, its relative spread is sqrt(4/5 / n) = 1.4 %, |xi|'s half.
    size, curvature, tolerance, draws = 4000, 0.01, 0.1, 8
    model, loss = isotropic(size, curvature, seed=0)
    ratio = sw.probes.rho_uniform(model, loss, toward=UNIT, tolerance=tolerance, draws=draws)
    exact = math.sqrt(size / 12 * curvature / 2 / tolerance)
    spread = exact * math.sqrt(4 / 5 / size) / 2
    assert abs(ratio.value - exact) < 5 * spread / math.sqrt(draws) + exact * RESOLUTION
    # the standard error of 8 draws is itself known to 1 / sqrt(14) = 27 %: four of these, and the resolution
    assert ratio.stderr == pytest.approx(spread / math.sqrt(draws), rel=4 * 0.27, abs=exact * RESOLUTION)
    assert not ratio.tautology
    assert len(ratio.widths) == draws


def test_uniform_noise_stays_within_half_a_step_and_clips_where_the_grid_ends():
    model = row([0.2, 6.4, 9.5, -8.0])
    target = place(model, sw.intn(4, block=None, scale=1.0), "toward")
    draws = torch.cat([uniform_noise(target, key)("weight", model.weight.detach()) for key in keys(0, 2000)])
    assert draws[:, :2].abs().max() <= 0.5
    assert draws[:, :2].var(0).tolist() == pytest.approx([1 / 12, 1 / 12], rel=5 * math.sqrt(0.8 / 2000))  # Var of x^2: 1/80 - 1/144
    assert torch.equal(draws[:, 2:], torch.tensor([[-2.5, 1.0]], dtype=torch.float64).expand(2000, 2))
    again = uniform_noise(target, keys(0, 2000)[7])("weight", model.weight.detach())
    assert torch.equal(again, draws[7:8])


def test_gaussian_noise_has_the_norms_of_the_output_rows():
    model = nn.Linear(6, 4, bias=False).double()
    target = place(model, sw.int4(block="channel"), "toward")
    noise = gaussian_noise(axes(target), keys(3, 1)[0])("weight", model.weight.detach())
    assert torch.allclose(noise.norm(dim=1), model.weight.norm(dim=1))
    inputs_first = place(model, sw.intn(4, block="channel", axis=0), "toward")  # as GPT-2 stores it: a column is an output
    noise = gaussian_noise(axes(inputs_first), keys(3, 1)[0])("weight", model.weight.detach())
    assert torch.allclose(noise.norm(dim=0), model.weight.norm(dim=0))


def test_all_ratios_agree_where_no_direction_is_special():
    # On h/2 |w - c|^2 the width is the same radius sqrt(2 tau / h) in every direction, so every ratio is |q - w| over it.
    size, curvature, tolerance = 40, 0.05, 0.2
    model, loss = isotropic(size, curvature, seed=1)
    exact = float((UNIT(loss.centre) - loss.centre).norm()) * math.sqrt(curvature / 2 / tolerance)
    options = {"toward": UNIT, "tolerance": tolerance}
    assert sw.probes.rho_self(model, loss, **options).value == pytest.approx(exact, rel=RESOLUTION)
    assert sw.probes.rho_fn(model, loss, **options, draws=3).value == pytest.approx(exact, rel=RESOLUTION)
    assert sw.probes.rho_cross(model, loss, **options, coarse=sw.intn(3, block=None, scale=2.0)).value == pytest.approx(
        exact, rel=RESOLUTION
    )


def test_one_width_serves_every_grid():
    model, loss = isotropic(30, 0.05, seed=2)
    first = sw.probes.rho_fn(model, loss, toward=UNIT)
    calls, coarse = loss.calls, sw.intn(3, block=None, scale=2.5)
    second = sw.probes.rho_fn(model, loss, toward=coarse, width=first.widths[0])
    assert (loss.calls, second.cost) == (calls, (0, 0))
    assert second.value == pytest.approx(sw.probes.rho_fn(model, loss, toward=coarse).value, rel=1e-12)
    with pytest.raises(ValueError, match=r"measured for tolerance 0\.1"):
        sw.probes.rho_fn(model, loss, toward=coarse, width=first.widths[0], tolerance=0.2)


def test_layers_add_in_quadrature_on_a_block_diagonal_quadratic():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    centre = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss = Quadratic(torch.block_diag(positive(6, 0), 5 * positive(4, 1)), centre)
    q = sw.int2(block="channel")
    layers, whole = sw.probes.rho_layers(model, loss, toward=q), sw.probes.rho_self(model, loss, toward=q)
    assert layers.value == pytest.approx(whole.value, rel=2 * RESOLUTION)
    for name, part, hessian in (("0.weight", 0, positive(6, 0)), ("1.weight", 1, 5 * positive(4, 1))):
        w = model[part].weight.detach()
        error = (q(w) - w).flatten()
        assert layers.layers[name].value == pytest.approx(math.sqrt(float(error @ hessian @ error) / 2 / 0.1), rel=RESOLUTION)
    assert sum(ratio.cost.forward for ratio in layers.layers.values()) + 2 == layers.cost.forward


@pytest.mark.parametrize("seed", range(3))
def test_rescaling_layers_moves_rho_fn_only(seed):
    # relu(4 z) = 4 relu(z): W1, b1 times 4 and W2 / 4 are the same function, with the same codes. rho_fn measures |q - w| over all layers
    # in one unit of length and changes where they differ in relative error (the outlier); the others see only functions and half steps.
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)), normal(200, 16, seed=seed).float()
    y = torch.randint(5, (200,), generator=torch.Generator().manual_seed(10 + seed))
    model[2].weight.data[0, 0] = 4.0
    q = sw.intn(3, block=None)

    def ratios():
        loss = lambda m: cross_entropy(3 * m(x), y)  # noqa: E731
        probes = (sw.probes.rho_self, sw.probes.rho_uniform, sw.probes.rho_fn)
        return [probe(model, loss, toward=q, tolerance=0.02).value for probe in probes]

    before = ratios()
    with torch.no_grad():
        model[0].weight *= 4
        model[0].bias *= 4
        model[2].weight /= 4
    after = ratios()
    assert after[:2] == pytest.approx(before[:2], rel=1e-3)
    assert abs(after[2] / before[2] - 1) > 0.1


def test_noise_needs_a_grid_and_draws():
    model, loss = row([0.4]), Quadratic(torch.eye(1), torch.zeros(1))
    with pytest.raises(TypeError, match="must be encoded"):
        sw.probes.rho_uniform(model, loss, toward={"weight": torch.zeros(1, 1)})
    for draws in (0, 1.5, True):
        with pytest.raises(ValueError, match="`draws`"):
            sw.probes.rho_uniform(model, loss, toward=UNIT, draws=draws)
        with pytest.raises(ValueError, match="`draws`"):
            sw.probes.rho_fn(model, loss, toward=UNIT, draws=draws)


@pytest.mark.parametrize("quantizer", [sw.int4(), sw.intn(3, block=16), sw.fp4(), sw.nvfp4(), sw.intn(4, levels="full")], ids=str)
def test_absmax_grids_clip_no_weight(quantizer):
    # the largest weight of every block lies on the edge, in float32 up to its last bit: it takes part in the noise like all others
    model = nn.Linear(64, 64, bias=False)
    model.weight.data = normal(64, 64, seed=0).float()
    target = place(model, quantizer, "toward")
    noise = uniform_noise(target, keys(0, 1)[0])("weight", model.weight.detach())
    assert noise.abs().gt(1e-6 * noise.abs().max()).double().mean() > 0.999
