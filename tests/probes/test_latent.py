"""The latent point after training, on numbers worked out by hand."""

import math

import pytest
import torch
from tests.probes.models import UNIT, Quadratic, row

import stepwell as sw


def test_a_case_by_hand():
    # b = (.4, .3, 8.6), r = (0, 0, 7) because the grid ends at 7; w = (.6, .4, 8.6), q = (1, 0, 7); L = |x|^2 / 2
    before = torch.tensor([[0.4, 0.3, 8.6]], dtype=torch.float64)
    found = sw.probes.latent(row([0.6, 0.4, 8.6]), Quadratic(torch.eye(3), torch.zeros(3), offset=0.0), at=UNIT, start={"weight": before})
    assert found.start == pytest.approx((0.16 + 0.09 + 73.96) / 2)
    assert found.rounded_loss == pytest.approx(49 / 2)
    assert found.clipped_loss == pytest.approx((0.16 + 0.09 + 49) / 2)
    assert found.latent_loss == pytest.approx((0.36 + 0.16 + 73.96) / 2)
    assert found.loss == found.final == pytest.approx(50 / 2)
    # w - b = (.2, .1, 0), r - b = (-.4, -.3, -1.6)
    assert found.compensation == pytest.approx(0.11 / math.sqrt(0.05 * (0.16 + 0.09 + 2.56)))
    assert found.distance == pytest.approx(math.sqrt(0.36 + 0.09 + 2.56))
    assert found.rounded_distance == pytest.approx(math.sqrt(0.16 + 0.09 + 2.56))
    assert found.latent_distance == pytest.approx(math.sqrt(0.05))
    assert (found.changed, found.near, found.farthest) == (pytest.approx(1 / 3), 1.0, 1)
    assert found.cost == (7, 0)


def test_far_moves_are_counted_in_steps():
    found = sw.probes.latent(
        row([3.2, 0.1, 0.0, 1.0]), Quadratic(torch.eye(4), torch.zeros(4)), at=UNIT, start={"weight": torch.zeros(1, 4)}
    )
    assert (found.changed, found.near, found.farthest) == (0.5, 0.75, 3)
    assert math.isnan(found.compensation)  # zeros are on the grid: there is no rounding error to make up for


def test_deployed_weights_need_a_grid():
    with pytest.raises(TypeError, match="`at` must be encoded"):
        sw.probes.latent(
            row([0.4]), Quadratic(torch.eye(1), torch.zeros(1)), at={"weight": torch.zeros(1, 1)}, start={"weight": torch.zeros(1, 1)}
        )
