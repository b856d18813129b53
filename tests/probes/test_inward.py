"""Gradients against the way back, with quadratics worked out by hand, and what many points say together."""

import math

import pytest
import torch
from scipy.stats import mannwhitneyu
from tests.probes.models import UNIT, Quadratic, normal, positive, row
from torch.nn.functional import cosine_similarity

import stepwell as sw
from stepwell.probes.inward import Inward, auc


def test_round_bowl_points_straight_back():
    centre = torch.tensor([0.4, 2.3, -1.2], dtype=torch.float64)
    loss = Quadratic(2 * torch.eye(3), centre, offset=0.0)
    found = sw.probes.inward(row(centre), loss, at=UNIT)
    error = UNIT(centre) - centre  # 0.4 -> 0, 2.3 -> 2, -1.2 -> -1
    assert found.cosine == pytest.approx(1)
    assert found.projection == pytest.approx(2 * error.norm().item())
    assert found.loss == pytest.approx(error.square().sum().item())
    assert (found.latent_loss, found.start, found.distance, found.changed) == (0, 0, 0, 0)
    assert math.isnan(found.latent_cosine)  # no gradient at the minimum
    assert found.random == 3**-0.5
    assert found.outside == (found.loss > 0.1)
    assert found.cost == (4, 2)


@pytest.mark.parametrize("seed", range(5))
def test_against_gradients_written_out(seed):
    size = 8
    hessian, centre = positive(size, seed), 2 * normal(size, seed=10 + seed)
    latent = centre + normal(size, seed=20 + seed)
    loss = Quadratic(hessian, centre)
    found = sw.probes.inward(row(latent), loss, at=UNIT, toward={"weight": centre[None]}, tolerance=0.5)
    q = UNIT(latent)
    back = centre - q
    at_q, at_w = -hessian @ (q - centre), -hessian @ (latent - centre)
    assert found.cosine == pytest.approx(cosine_similarity(at_q, back, dim=0).item())
    assert found.latent_cosine == pytest.approx(cosine_similarity(at_w, back, dim=0).item())
    assert found.projection == pytest.approx((at_q @ back / back.norm()).item())
    assert found.loss == pytest.approx(0.5 + (back @ hessian @ back / 2).item())
    assert found.start == pytest.approx(0.5)
    assert found.outside == (found.loss > 1.0)
    assert found.distance == pytest.approx((latent - centre).norm().item())
    assert found.changed == (UNIT(latent) != UNIT(centre)).double().mean().item()
    assert found.cost == (5, 2)


def test_a_convex_loss_points_inwards_inside_and_outside():
    # first-order convexity: the gradient at q against b - q is at most L(b) - L(q) < 0
    for seed in range(10):
        centre = 2 * normal(6, seed=seed)
        found = sw.probes.inward(row(centre), Quadratic(positive(6, seed), centre), at=UNIT, tolerance=1e6)
        assert found.cosine > 0
        assert not found.outside


def test_baseline_is_taken_as_given():
    loss = Quadratic(torch.eye(1), torch.zeros(1), offset=0.0)
    options = {"at": {"weight": torch.ones(1, 1)}, "toward": {"weight": torch.zeros(1, 1)}}
    found = sw.probes.inward(row([0.4]), loss, **options, baseline=0.45)
    assert (found.start, found.outside, found.cost.forward) == (0.45, False, 4)
    assert sw.probes.inward(row([0.4]), loss, **options, baseline=0.35).outside
    assert math.isnan(found.changed)  # plain tensors have no codes
    with pytest.raises(ValueError, match="`baseline` must be finite"):
        sw.probes.inward(row([0.4]), loss, **options, baseline=float("nan"))


def test_unused_weights_have_no_gradient():
    model = row([0.4, 0.3])
    model.other = row([1.3])
    found = sw.probes.inward(model, lambda m: m.weight.square().sum(), at={"weight": torch.ones(1, 2), "other.weight": torch.ones(1, 1)})
    # -grad = (-2, -2, 0), back = (-.6, -.7, .3)
    assert found.cosine == pytest.approx(2.6 / math.sqrt(8 * (0.36 + 0.49 + 0.09)))


def point(cosine: float, latent: float, projection: float, outside: bool) -> Inward:
    return Inward(cosine, latent, projection, 0.1, 1.0, 1.0, 0.0, outside, 0.0, 0.0, (4, 2))


def test_contrast_counts_shares():
    rows = [point(0.5, -0.1, 3.0, True), point(0.2, 0.3, 2.0, True), point(0.3, 0.1, 1.0, False), point(-0.1, 0.1, 2.5, False)]
    found = sw.probes.contrast(rows)
    assert (found.points, found.outside) == (4, 2)
    assert (found.inward_outside, found.inward_inside) == (1.0, 0.5)
    assert (found.latent_outside, found.latent_inside) == (0.5, 1.0)
    assert found.stronger_outside == 0.5
    assert (found.auc_cosine, found.auc_projection) == (0.75, 0.75)
    alone = sw.probes.contrast(rows[:2])
    assert math.isnan(alone.inward_inside)
    assert math.isnan(alone.auc_projection)
    with pytest.raises(ValueError, match="`points`"):
        sw.probes.contrast([])


def test_auc_is_the_mann_whitney_statistic():
    for seed in range(5):
        one, two = (normal(12, seed=seed) * 2).round().tolist(), (normal(9, seed=50 + seed) * 2).round().tolist()
        assert auc(one, two) == pytest.approx(mannwhitneyu(one, two).statistic / (len(one) * len(two)))
