"""The loss along a line, against polynomials that are known exactly."""

import copy

import pytest
import torch
from tests.probes.models import UNIT, Batch, Everything, Quadratic, normal, positive, row

import stepwell as sw


def test_quadratic_loss_is_a_parabola_along_the_line():
    size = 6
    hessian, centre, begin, end = positive(size, 0), normal(size, seed=1), normal(size, seed=2), normal(size, seed=3)
    line = sw.probes.segment(row(begin), Quadratic(hessian, centre), toward={"weight": end[None]})
    slope, curve = (hessian @ (begin - centre)) @ (end - begin), (end - begin) @ hessian @ (end - begin)
    start = 0.5 + (begin - centre) @ hessian @ (begin - centre) / 2
    assert line.positions == tuple(k / 10 for k in range(16))
    assert line.losses == pytest.approx([float(start + a * slope + a * a * curve / 2) for a in line.positions], rel=1e-12)
    assert line.start == line.losses[0]
    assert line.final == line.losses[10]


def test_exponent_of_powers():
    for power in (1, 2, 3):
        line = sw.probes.segment(row([0.0]), lambda m, p=power: 1 + m.weight.abs().sum() ** p, toward={"weight": torch.ones(1, 1)})
        assert line.exponent == pytest.approx(power, rel=1e-9)
    falling = sw.probes.segment(row([1.0]), lambda m: m.weight.abs().sum(), toward={"weight": torch.zeros(1, 1)})
    assert falling.exponent != falling.exponent  # NaN: it does not rise


def test_barrier_and_defect_of_a_double_well():
    # (x^2 - 1)^2 from -1 to 1, x = 2a - 1: zero at both ends, 1 in the middle; beyond a = 1 it rises to 9 at a = 1.5. It falls by 1 in all.
    well = lambda m: (m.weight.square() - 1).square().sum()  # noqa: E731
    line = sw.probes.segment(row([-1.0]), well, toward={"weight": torch.ones(1, 1)})
    assert (line.barrier, line.defect) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert line.losses[-1] == pytest.approx(9.0)
    monotone = sw.probes.segment(row([0.0]), lambda m: m.weight.square().sum(), toward={"weight": torch.ones(1, 1)})
    assert (monotone.barrier, monotone.defect) == (0.0, 0.0)


def test_ends_are_bit_for_bit_the_float_and_the_rounded_model():
    model, batch, q = Everything().eval(), Batch(), sw.int3(block="channel")
    rounded = copy.deepcopy(model)
    encoded = sw.ptq.rtn(rounded, q)
    for toward in (q, encoded, {name: one.decode() for name, one in encoded.items()}):
        line = sw.probes.segment(model, batch, toward=toward)
        with torch.no_grad():
            assert (line.losses[0], line.losses[10]) == (batch(model).item(), batch(rounded).item())


def test_between_two_other_points():
    loss = Quadratic(torch.eye(2), torch.tensor([1.0, 0.0]), offset=0.0)
    line = sw.probes.segment(
        row([5.0, 5.0]), loss, start={"weight": torch.zeros(1, 2)}, toward={"weight": torch.tensor([[2.0, 0.0]])}, positions=(0, 0.25, 1)
    )
    assert line.losses == pytest.approx([0.5, 0.125, 0.5])  # (2a - 1)^2 / 2
    assert (line.start, line.barrier) == (20.5, 0.0)  # the model's own: 1/2 (16 + 25)


def test_half_precision_weights_come_back_to_the_last_bit():
    model = Everything().to(torch.bfloat16)
    before, batch = copy.deepcopy(model.state_dict()), Batch()
    line = sw.probes.segment(model, lambda m: m(batch.x.bfloat16()).float().square().mean(), toward=sw.int2(block="channel"))
    assert len(set(line.losses)) > 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_points_with_different_scales_are_refused():
    model = row([0.4, 1.3])
    coarse, fine = (sw.probes.rounded(model, sw.intn(4, block=None, scale=scale)) for scale in (0.5, 0.25))
    loss = Quadratic(torch.eye(2), torch.zeros(2))
    with pytest.raises(ValueError, match="must share their scales"):
        sw.probes.segment(model, loss, start=coarse, toward=fine)
    line = sw.probes.segment(model, loss, start={name: one.decode() for name, one in coarse.items()}, toward=fine)
    assert line.losses[10] == pytest.approx(0.5 + (0.5**2 + 1.25**2) / 2)  # 0.4 -> 0.5, 1.3 -> 1.25


@pytest.mark.parametrize("positions", [(), (0, 0.5), (0.5, 1), (0, 1, 0.5), (0, 1, 1), (0, 1, float("inf"))])
def test_positions_must_rise_and_hold_both_ends(positions):
    with pytest.raises(ValueError, match="`positions` must rise"):
        sw.probes.segment(row([0.4]), Quadratic(torch.eye(1), torch.zeros(1)), toward=UNIT, positions=positions)


def test_a_state_dictionary_is_a_start_and_a_missing_weight_is_refused():
    model, other, batch, q = Everything().eval(), Everything(seed=1).eval(), Batch(), sw.int3(block="channel")
    line = sw.probes.segment(model, batch, toward=q, start=other.state_dict(), positions=(0, 1))
    mixed = copy.deepcopy(model)  # only the rounded weights move: biases and BatchNorm stay
    for name in sw.probes.rounded(model, q):
        mixed.get_parameter(name).data.copy_(other.get_parameter(name))
    with torch.no_grad():
        assert line.losses[0] == batch(mixed).item()
    with pytest.raises(ValueError, match=r"`start` must hold every weight that is moved: got none for conv\.weight, frozen\.weight"):
        sw.probes.segment(model, batch, toward=q, start={"head.weight": model.head.weight})
