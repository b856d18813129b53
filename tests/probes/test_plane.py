"""The two panels, against a quadratic written out on the same plane."""

import pytest
import torch
from tests.probes.models import UNIT, Quadratic, normal, positive, row

import stepwell as sw


def drawn(size=6, seed=0):
    begin = 2 * normal(size, seed=seed)
    return begin, UNIT(begin), begin + normal(size, seed=seed + 1), Quadratic(positive(size, seed), normal(size, seed=seed + 2))


def test_panels_hold_the_loss_and_the_loss_of_the_rounded_weights():
    begin, rounded, trained, loss = drawn()
    found = sw.probes.plane(row(begin), loss, toward=UNIT, across={"weight": trained[None]}, tolerance=2.0)
    one, two = rounded - begin, trained - begin
    e1 = one / one.norm()
    e2 = two - (two @ e1) * e1
    assert len(found.positions) == 17
    assert (found.positions[4], found.positions[12]) == (0.0, 1.0)
    inside = [0, 0]
    for i, y in enumerate(found.positions):
        for j, x in enumerate(found.positions):
            at = begin + x * one + y * e2
            assert found.losses[i][j] == pytest.approx(loss(row(at)).item(), rel=1e-9)
            # on the frozen integers -7..7, away from ties
            if ((at - at.floor()) - 0.5).abs().min() > 1e-9:
                assert found.rounded[i][j] == pytest.approx(loss(row(at.round().clamp(-7, 7))).item(), rel=1e-12)
            inside = [count + (panel[i][j] <= found.start + 2) for count, panel in zip(inside, (found.losses, found.rounded), strict=True)]
    assert [found.area, found.rounded_area] == [count / 289 for count in inside]
    assert found.cost.forward == 2 * 17**2 + 2


def test_marks_angle_and_lengths():
    begin, rounded, trained, loss = drawn(seed=4)
    found = sw.probes.plane(row(begin), loss, toward=UNIT, across={"weight": trained[None]}, size=5)
    one, two = rounded - begin, trained - begin
    assert found.cosine == pytest.approx((one @ two / one.norm() / two.norm()).item())
    assert found.lengths[0] == pytest.approx(one.norm().item())
    assert found.lengths[0] ** 2 * found.mark**2 + found.lengths[1] ** 2 == pytest.approx(two.square().sum().item())
    assert found.losses[1][3] == pytest.approx(loss(row(rounded)).item())  # positions -.5, 0, .5, 1, 1.5
    assert found.rounded[1][1] == pytest.approx(found.losses[1][3])  # the start rounds to the target


def test_points_on_a_line_span_no_plane():
    begin, rounded, _, loss = drawn()
    for across in (2 * rounded - begin, begin):
        with pytest.raises(ValueError, match="must span a plane"):
            sw.probes.plane(row(begin), loss, toward=UNIT, across={"weight": across[None]})
    with pytest.raises(ValueError, match="`size`"):
        sw.probes.plane(row(begin), loss, toward=UNIT, across={"weight": torch.zeros(1, 6)}, size=1)
