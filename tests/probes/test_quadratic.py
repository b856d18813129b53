"""The local second-order model, against Hessians that are known or written out by autograd's dense one.

Curvatures are central differences of the slope over h = 1e-2 |w| / |v|: off by h^2 / 6 times its third derivative, and exact on quadratics.
"""

import copy
import math

import pytest
import torch
from tests.probes.models import UNIT, Quadratic, normal, positive, row
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import stepwell as sw


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_is_predicted_exactly(seed):
    size = 6
    hessian, centre, begin = positive(size, seed), normal(size, seed=10 + seed), 2 * normal(size, seed=20 + seed)
    found = sw.probes.quadratic(row(begin), Quadratic(hessian, centre), toward=UNIT)
    error = UNIT(begin) - begin
    assert found.slope == pytest.approx((hessian @ (begin - centre) @ error).item())
    assert found.curvature == pytest.approx((error @ hessian @ error).item())
    assert found.predicted == pytest.approx(found.actual)
    assert found.ratio == pytest.approx(1)
    assert found.cost == (6, 3)


def test_small_network_against_its_dense_hessian():
    torch.manual_seed(0)
    model, x, q = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), normal(20, 4, seed=1), sw.int3(block="channel")

    def of(first, second):
        return (torch.tanh(x @ first.T + model[0].bias) @ second.T + model[2].bias - 1).square().mean()

    weights = (model[0].weight.detach(), model[2].weight.detach())
    ways = [q(weight) - weight for weight in weights]
    dense = torch.autograd.functional.hessian(of, weights)
    curvature = sum(
        torch.tensordot(one, torch.tensordot(dense[i][j], two, 2), 2) for i, one in enumerate(ways) for j, two in enumerate(ways)
    )
    found = sw.probes.quadratic(model, lambda m: (m(x) - 1).square().mean(), toward=q)
    assert found.curvature == pytest.approx(curvature.item(), rel=1e-2)  # h is 6e-2 here
    exact = sw.probes.exact_quadratic(model, lambda m: (m(x) - 1).square().mean(), toward=q)
    assert exact.curvature == pytest.approx(curvature.item(), rel=1e-10)
    assert (exact.slope, exact.actual) == (pytest.approx(found.slope, rel=1e-10), found.actual)
    assert found.actual == pytest.approx((of(*(w + v for w, v in zip(weights, ways, strict=True))) - of(*weights)).item(), rel=1e-10)
    # finite differences of the slope along the line
    step = 1e-5
    ends = [of(*(w + sign * step * v for w, v in zip(weights, ways, strict=True))) for sign in (1, -1)]
    assert found.slope == pytest.approx(((ends[0] - ends[1]) / 2 / step).item(), rel=1e-6)


def test_saturating_loss_is_overestimated_and_a_wall_underestimated():
    # 1 - exp(-x^2) from 0 to 3: predicted 9, actual 1 - e^-9; x^4 from 1 to 2: 4 + 6 = 10 against 15
    ends = {"weight": torch.full((1, 1), 3.0)}
    flat = sw.probes.quadratic(row([0.0]), lambda m: (1 - torch.exp(-m.weight.square())).sum(), toward=ends)
    assert flat.ratio == pytest.approx(9 / (1 - math.exp(-9)), rel=1e-2)  # h is 1e-2, the slope's third derivative -12 * 3^4 against 18
    wall = sw.probes.quadratic(row([1.0]), lambda m: (m.weight**4).sum(), toward={"weight": torch.full((1, 1), 2.0)})
    assert wall.ratio == pytest.approx(10 / 15, rel=1e-3)


def test_linear_loss_has_no_curvature():
    found = sw.probes.quadratic(row([0.4, 0.3]), lambda m: 2 * m.weight.sum(), toward=UNIT)
    assert (found.slope, found.curvature) == (pytest.approx(-1.4), 0.0)
    still = sw.probes.quadratic(row([1.0]), lambda m: m.weight.square().sum(), toward=UNIT)
    assert math.isnan(still.ratio)


def test_kinks_count_with_what_they_bend_on_average():
    # max(0, w - 1) bends at 1 by 1: within 1e-2 |w| of it the slope goes from 0 to 1, a curvature of 1 / (2e-2 |w|) per unit of length
    ramp = sw.probes.quadratic(row([1.0]), lambda m: torch.relu(m.weight - 1).sum(), toward={"weight": torch.full((1, 1), 2.0)})
    assert ramp.curvature == pytest.approx(50.0)
    piece = sw.probes.exact_quadratic(row([1.0]), lambda m: torch.relu(m.weight - 1).sum(), toward={"weight": torch.full((1, 1), 2.0)})
    assert piece.curvature == 0.0


def test_a_curvature_in_single_precision_is_that_in_double():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), normal(64, 16, seed=1)
    single, double = (
        sw.probes.quadratic(one, lambda m, x=x: (m(x) - 1).square().mean(), toward=sw.int3(block="channel"))
        for one, x in ((model, x.float()), (copy.deepcopy(model).double(), x))
    )
    assert single.curvature == pytest.approx(double.curvature, rel=1e-3)


class Attention(nn.Module):
    """One head whose fused kernel has no second derivative."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)


def test_fused_attention_has_a_curvature():
    torch.manual_seed(0)
    model, x, q = Attention().double(), normal(2, 5, 8, seed=0), sw.int4(block="channel")
    loss = lambda m: m(x[:, None]).square().mean()  # noqa: E731
    found = sw.probes.quadratic(model, loss, toward=q)
    start = [p.detach().clone() for p in model.parameters()]
    step, values = 1e-4, []
    for sign in (1, 0, -1):
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), start, strict=True):
                parameter.copy_(weight + sign * step * (q(weight) - weight) if weight.ndim > 1 else weight)
            values.append(loss(model).item())
    # second differences: rounding errors 1e-16 / step^2 = 1e-8 of a loss near 0.1, truncation step^2
    expected = (values[0] - 2 * values[1] + values[2]) / step**2
    assert sw.probes.exact_quadratic(model, loss, toward=q).curvature == pytest.approx(expected, rel=1e-3)
    assert found.curvature == pytest.approx(expected, rel=3e-2)
