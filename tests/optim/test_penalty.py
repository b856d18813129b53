"""The penalty in the kernels: against LOTION written out in float64 (tests/reference/lotion.py), and where arithmetic is hard."""

import pytest
import torch
from tests.cases import gaussian
from tests.reference.lotion import AdamW as Slow
from tests.reference.lotion import penalty as slow_penalty

import stepwell as sw
from stepwell.optim import AdamW
from stepwell.optim.task import Task
from stepwell.scales import Fit

ROWS, COLUMNS, REACH, LR = 12, 192, 10.0, 1e-2
ULP = 2.0**-23
GRIDS = [
    sw.int2(block=16), sw.int3(block=32), sw.int4(block=48), sw.int4(block=64), sw.intn(8, block=96), sw.ternary(block=12),
    sw.intn(3, block="channel"), sw.intn(4, block=None), sw.intn(2, block=32, levels="full"), sw.intn(4, block="channel", levels="full"),
]  # fmt: skip


def length(quantizer):
    return {"channel": COLUMNS, None: ROWS * COLUMNS}.get(quantizer.block, quantizer.block)


def started(weight, second, step=7):
    """Return a parameter and its optimizer, as after `step` steps."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = AdamW([parameter], lr=LR)
    first = gaussian(*weight.shape, seed=3) * second.sqrt()
    optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second.clone()}
    parameter.grad = gaussian(*weight.shape, seed=4) * second.sqrt()
    return parameter, optimizer


def asked(quantizer, *, through_scale=True, terms=40.0, latent=None, scales=None):
    return Task(quantizer.format, length(quantizer), latent, scales, terms, 1.0, through_scale, REACH)


def written_out(parameter, optimizer, quantizer, *, through_scale, terms):
    """Return the weight that LOTION in float64 ends with, and whether the penalty's gradient was bounded.

    The largest weight of a block lies on the grid, where the derivative at a fixed scale has two values; the subgradient 0 is asked for.
    """
    state, bounded = optimizer.state[parameter], []
    slow = Slow([parameter.detach().double()], lr=LR)
    slow.first, slow.second, slow.steps = [state["exp_avg"].double()], [state["exp_avg_sq"].double()], int(state["step"])

    def force(index, weight, curvature):
        rows = weight.reshape(-1, length(quantizer)).clone().requires_grad_()
        value = slow_penalty(rows, curvature.reshape(rows.shape), quantizer, through_scale=through_scale)
        (found,) = torch.autograd.grad(value, rows)
        if not through_scale:
            found = found.masked_fill(rows.abs() == rows.abs().amax(1, keepdim=True), 0)
        force, bound = terms * found.reshape(weight.shape), REACH * (curvature.sqrt() + 1e-8)
        bounded.append(force.abs() > bound)
        return force.clamp(-bound, bound)

    slow.step([parameter.grad.double()], force)
    return slow.weights[0], bounded[0]


def off_the_grid(weight, quantizer):
    """Return weights that lie a hundredth of a step from any grid value, but for each block's largest: float32 cannot tell nearer ones."""
    rows = weight.reshape(-1, length(quantizer))
    scale = quantizer.local().fit(rows).scale
    units = rows / scale
    near = ((units - units.round()).abs() < 0.01) & (rows.abs() < rows.abs().amax(1, keepdim=True))
    return torch.where(near, rows + 0.02 * scale, rows).reshape(weight.shape)


@pytest.mark.parametrize("through_scale", [True, False], ids=["through scale", "scale detached"])
@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_step_is_lotion_written_out(kernel, quantizer, through_scale):
    """One step in float32 against float64.

    Rounding: the weight (1 ulp of it); the move, at most REACH + 3 rates in size, of some ten operations (16 ulps of it); and the sum over
    a block, whose error is at most its length in ulps of the sum of its terms' magnitudes, each at most g s (code + 1) / 2, which reaches
    the weights on the edge divided by the edge and by their own root mean square gradient.
    """
    second = gaussian(ROWS, COLUMNS, seed=2).square() * 1e-4 + 1e-8
    weight = off_the_grid(0.1 * gaussian(ROWS, COLUMNS, seed=1), quantizer)
    parameter, optimizer = started(weight, second)
    block, edge = length(quantizer), quantizer.format.edge
    terms = 10 * edge  # fine grids have small cells, and forces in proportion
    expected, bounded = written_out(parameter, optimizer, quantizer, through_scale=through_scale, terms=terms)
    optimizer.assign({parameter: asked(quantizer, through_scale=through_scale, terms=terms)})
    optimizer.step()
    rows, held = second.reshape(-1, block), weight.reshape(-1, block)
    scale, largest = quantizer.local().fit(held).scale.abs(), held.abs().amax(1, keepdim=True)
    total = block * ULP * terms * (rows * scale * (edge + 1)).sum(1, keepdim=True) / edge
    through = (LR * total / rows.sqrt() * (held.abs() == largest)).reshape(weight.shape)
    slack = ULP * (weight.abs() + 16 * LR * (REACH + 3)) + through_scale * through
    assert ((parameter - expected).abs() <= slack).all()
    assert bounded.float().mean() < 0.1
    plain, other = started(weight, second)
    other.step()
    assert ((plain - parameter).abs() > 100 * slack).float().mean() > 0.2  # the penalty is no rounding error


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_shown_weights_are_the_trained_ones_on_their_grid(kernel, quantizer):
    """Bit for bit what the quantizer gives; and what is trained does not depend on whether it is shown."""
    weight, second = awkward(), gaussian(ROWS, COLUMNS, seed=2).square() * 1e-6
    parameter, optimizer = started(torch.zeros(ROWS, COLUMNS), second)
    latent = weight.clone()
    optimizer.assign({parameter: asked(quantizer, latent=latent)})
    optimizer.step()
    alone, other = started(weight, second)
    other.assign({alone: asked(quantizer)})
    other.step()
    assert torch.equal(latent, alone)
    assert torch.equal(parameter, quantizer(latent))
    assert not torch.equal(latent, weight)


def awkward():
    """Return weights with blocks of zeros, ties at the edge of the grid, blocks on the grid, negative zeros, tiny and large ones."""
    weight = 0.1 * gaussian(ROWS, COLUMNS, seed=5)
    weight[0] = 0
    weight[1] = -weight[1].abs().max()
    weight[2] = sw.int3(block=None)(weight[2][None])[0]
    weight[3, ::2] = -0.0
    weight[4] *= 1e-30
    weight[5] *= 1e-40  # subnormal
    weight[6] *= 1e30
    return weight


def moved_by_penalty(weight, second, task):
    """Return the first moment with a task, and without its penalty."""
    found = []
    for given in (task, task._replace(strength=0.0)):
        parameter, optimizer = started(weight, second)
        optimizer.assign({parameter: given})
        optimizer.step()
        found.append(optimizer.state[parameter]["exp_avg"])
    return found


def test_weights_on_the_grid_are_not_pushed(kernel):
    quantizer = sw.int4(block=32)
    weight = quantizer(gaussian(ROWS, COLUMNS, seed=6))
    pushed, plain = moved_by_penalty(weight, torch.ones(ROWS, COLUMNS), asked(quantizer, through_scale=False, terms=1e6))
    assert torch.equal(pushed, plain)


def test_penalty_stays_finite_and_bounded_wherever_the_weights_are(kernel):
    """Also at scales whose reciprocal float32 cannot hold; weights without a gradient are pushed by ten epsilons at most."""
    quantizer, second = sw.int4(block=32), gaussian(ROWS, COLUMNS, seed=2).square() * 1e-3
    second[:, ::7] = 0
    pushed, plain = moved_by_penalty(awkward(), second, asked(quantizer, terms=1e4))
    assert pushed.isfinite().all()
    assert torch.equal(pushed[0], plain[0])  # a block of zeros has no cells
    bound = (1 - 0.9) * REACH * ((second / (1 - 0.999**7)).sqrt() + 1e-8)  # as much of the first moment as a gradient of that size
    assert ((pushed - plain).abs() <= bound * (1 + 4 * ULP) + 4 * ULP * plain.abs()).all()
    assert ((pushed - plain).abs() >= 0.999 * bound)[7:].any()


def test_first_step_has_no_penalty(kernel):
    quantizer, found = sw.int4(block=32), []
    for terms in (1e4, 0.0):
        parameter = torch.nn.Parameter(gaussian(ROWS, COLUMNS, seed=0))
        optimizer = AdamW([parameter], lr=LR)
        parameter.grad = gaussian(ROWS, COLUMNS, seed=1)
        optimizer.assign({parameter: asked(quantizer, terms=terms)})
        optimizer.step()
        found.append(parameter.detach())
    assert torch.equal(*found)


def test_held_scales_are_used_and_not_differentiated(kernel):
    """With the scales that would be fitted, the penalty is the detached one; with others, weights are rounded to those."""
    quantizer, second = sw.int4(block=32), gaussian(ROWS, COLUMNS, seed=2).square() * 1e-3
    weight = 0.1 * gaussian(ROWS, COLUMNS, seed=1)
    fitted = quantizer.local().fit(weight.reshape(-1, 32)).scale
    held, _ = moved_by_penalty(weight, second, asked(quantizer, scales=fitted))
    detached, _ = moved_by_penalty(weight, second, asked(quantizer, through_scale=False))
    assert torch.equal(held, detached)
    narrow, latent = 0.6 * fitted, weight.clone()
    parameter, optimizer = started(weight, second)
    optimizer.assign({parameter: asked(quantizer, scales=narrow, latent=latent)})
    optimizer.step()
    assert torch.equal(parameter.reshape(-1, 32), quantizer.local().snap(latent.reshape(-1, 32), Fit(narrow)))
    outside = weight.reshape(-1, 32).abs() > 7 * narrow
    _, plain = moved_by_penalty(weight, second, asked(quantizer, scales=narrow))
    assert torch.equal(optimizer.state[parameter]["exp_avg"].reshape(-1, 32)[outside], plain.reshape(-1, 32)[outside])
    assert outside.any()
