"""Kernels of every other method and grid against the eager passes, which are the reference.

What the forward pass sees, what a proximal step leaves and which gradient passes are equal to the last bit: a run compares by value what it
shows. Sums over a block are added up in another order: relative error `block * 2**-24` of the sum of the terms' magnitudes.
"""

import copy

import pytest
import torch
from tests.cases import METHODS, gaussian
from tests.run.test_fused import awkward, managed
from tests.run.training import batches, latents, network, train, weights

import stepwell as sw
from stepwell.methods.fisher import FISHER, SEEN
from stepwell.run import fused, fused_held, passes
from stepwell.run.managed import SCALE, wide
from stepwell.run.told import MOVED, Told

pytest.importorskip("numba")

GRIDS = [
    sw.intn(4, block=32, levels="full"),
    sw.intn(2, block=16, levels="mid"),
    sw.intn(3, block="channel", levels="mid"),
    sw.int3(block=16),
    sw.int8(block=5),
    sw.ternary(block=32),
]
SUMMED = ("ste + lotion", "lotion", "lotion, scale frozen", "held scales, lotion", "own curvature", "lsq", "learned scales, parq")
SUMMED = (
    *SUMMED,
    "carried weights",
    "faster",
    "learned scales, latent",
    "default",
    "coupled",
    "coupled, nearest",
)  # last two: products reordered
SERVED = [name for name in METHODS if name != "soft"]  # which is not equal to the last bit: test_fused_soft.py


def tell(one, *, step=2):
    """Return what the method is told at a step, with own tensors that have seen something."""
    one.tensors = {} if one.method.init is None else one.method.init(wide(one.blocks(one.weight)), one.grid)
    if FISHER in one.tensors:
        one.tensors[FISHER].copy_(one.blocks(gaussian(*one.weight.shape, seed=7).square() * 1e-3))
        one.tensors[SEEN].fill_(5)
    scheduled = {name: schedule(step) for name, schedule in one.method.schedules.items()}
    correction = 1.7 if one.method.curved and one.method.curvature is None else None
    return Told(one.grid, step, 0.01, 64.0, one.held_fit(one.source), one.tensors, 77, one.name, 1000, scheduled, correction)


def both(name, quantizer, work, *others, scalars=()):
    """Return what a kernel and the eager pass make of awkward weights: all tensors, own ones included."""
    found = []
    for run in (fused.run, passes.piecewise):
        weight = awkward(24, 160)
        weight[6] = 1.0 if work is passes.gradient else weight[6]  # squares of 1e30 overflow
        one = managed(weight, METHODS[name](quantizer))
        told, tensors = tell(one), [one.weight, *(other.clone() for other in others)]
        if work in (passes.gradient, passes.descend):
            tensors = [tensors[1], tensors[0], *tensors[2:]]
        if run is fused.run:
            assert fused_held.has(work, one) or fused.serves(one)
        run(work, one, told, tensors, *scalars)
        found.append([*tensors, *(one.tensors[key] for key in sorted(one.tensors))])
    return found


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
@pytest.mark.parametrize("name", [name for name in SERVED if METHODS[name](sw.int3()).deploy is not None])
def test_deployed_weights_are_equal_to_the_last_bit(name, quantizer):
    found, expected = both(name, quantizer, passes.deploy, torch.empty(24, 160))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(found[1], awkward(24, 160))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["prox", "own curvature, prox", "cage"])
def test_proximal_steps_are_equal_to_the_last_bit(name, quantizer):
    curvature = gaussian(24, 160, seed=1).square() * 1e-3
    curvature[:, ::7] = 0
    found, expected = both(name, quantizer, passes.prox, curvature)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.equal(found[0], awkward(24, 160))


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
@pytest.mark.parametrize("name", [name for name in SERVED if METHODS[name](sw.int3()).gradient is not None])
def test_gradients_are_equal_and_what_is_learned_but_for_the_order_of_sums(name, quantizer):
    gradient, deployed = gaussian(24, 160, seed=1), quantizer(awkward(24, 160))
    found, expected = both(name, quantizer, passes.gradient, gradient, deployed)
    exact = name not in ("coupled", "coupled, nearest")
    for one, two in zip(found[:1], expected[:1], strict=True):
        torch.testing.assert_close(one, two, rtol=0 if exact else 1e-6, atol=0)
    for one, two in zip(found[1:], expected[1:], strict=True):  # a step of Adam is steep where the slope is next to nothing
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0], gradient) or name in ("own curvature", "own curvature, prox", "learned scales, latent")


@pytest.mark.parametrize("name", ["carried weights", "default"])
def test_scales_that_carry_say_by_how_much_and_do_it(name):
    quantizer = sw.intn(3, block=16, levels="full")
    latent, found = gaussian(24, 160, seed=0), []
    for run in (fused.run, passes.piecewise):
        one = managed(quantizer(latent), METHODS[name](quantizer))
        one.latent, gradient = latent.clone(), gaussian(24, 160, seed=1)
        told, before = tell(one), one.tensors[SCALE].clone()
        one.moved = torch.zeros_like(before)
        told = told._replace(carries=one.carries, tensors={**one.tensors, MOVED: one.moved})
        run(passes.gradient, one, told, [gradient, one.latent, one.weight])
        assert torch.equal(one.moved, one.tensors[SCALE] / before)
        assert torch.equal(one.weight, one.unblock(one.blocks(latent) * one.moved))
        assert torch.equal(one.latent, latent)
        found.append(one.moved)
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    assert (found[0] != 1).any()


@pytest.mark.parametrize("carried", [False, True], ids=["", "carried"])
@pytest.mark.parametrize("multiplier", [0.3, 0.5, 2.0])
def test_longer_steps_are_equal_but_for_one_rounding(multiplier, carried):
    """torch rounds a product and a sum at once: two roundings end an ulp of the sum and half one of the product from that."""
    latent, moved = gaussian(24, 160, seed=0), 1 + gaussian(120, 1, seed=2) * 0.01
    after, found = latent + gaussian(24, 160, seed=1) * 0.01, []
    for run in (fused.run, passes.piecewise):
        one = managed(after, sw.faster(sw.ste(sw.int4(block=32)), multiplier))
        told = tell(one)._replace(tensors={MOVED: moved} if carried else {})
        run(passes.lengthen, one, told, [one.weight, latent])
        found.append(one.weight.clone())
    before = one.unblock(one.blocks(latent) * moved) if carried else latent
    torch.testing.assert_close(found[0], before + (after - before) * multiplier, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*found, rtol=2.0**-23, atol=2.0**-24 * 0.05)  # products are below .05
    assert not torch.equal(found[0], after)


@pytest.mark.parametrize("odd", [None, torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
def test_scales_that_a_kernel_fits_are_the_rules_own_to_the_last_bit(quantizer, odd):
    weight = awkward(24, 160)
    weight[7], weight[8] = weight[7].abs(), -weight[8].abs()
    if odd is not None:
        weight[10, 5] = odd
    one = managed(weight, sw.ste(quantizer))
    found = torch.from_numpy(fused_held._fitted(one, one.blocks(weight).numpy(), fused._split)).reshape(-1, 1)
    expected = one.grid.fit(one.blocks(weight)).scale
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert found.isnan().any() == (odd is not None and odd != odd)


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["lotion", "lotion, scale frozen", "held scales, lotion", "own curvature"])
def test_pushed_moments_and_descents_are_equal_but_for_the_order_of_sums(name, quantizer):
    second, moment = gaussian(24, 160, seed=1).square() * 1e-3, gaussian(24, 160, seed=2) * 1e-3
    scalars = [torch.tensor(number, dtype=torch.float64) for number in (0.1, 125.0, 1e-7)]
    found, expected = both(name, quantizer, passes.push, moment, second, second, scalars=scalars)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)
    assert not torch.equal(found[1], moment)
    found, expected = both(name, quantizer, passes.descend, torch.empty(24, 160), second)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["held scales", "parq", "binary relax", "sampled", "prox", "cage"])
def test_what_is_not_finite_stays_visible(name, odd):
    weight = gaussian(4, 64, seed=0)
    weight[1, 7] = odd
    one = managed(weight, METHODS[name](sw.intn(4, block=32, levels="full")))
    told = tell(managed(gaussian(4, 64, seed=0), one.method))
    one.tensors = dict(told.tensors)
    work = passes.prox if name in ("prox", "cage") else passes.deploy
    fused.run(work, one, told._replace(fit=one.grid.fit(one.blocks(gaussian(4, 64, seed=0)))), [one.weight, torch.ones(4, 64)])
    assert one.weight.isnan().any() if odd != odd else not torch.equal(one.weight, weight)


def trained(method, *, compile=None):
    """Return latent and shown weights after some steps, and the run."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, method, optimizer, compile=compile)
    train(model, optimizer, batches(5))
    return {**latents(run, model), **{f"shown {name}": value for name, value in weights(model).items()}}, run


@pytest.mark.filterwarnings("ignore:.*saturates")
@pytest.mark.parametrize("quantizer", [sw.intn(3, block=16, levels="full"), sw.intn(2, block=16, levels="mid")], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_training_with_kernels_equals_training_without(name, quantizer, monkeypatch):
    """As for the compiled path: sums in another order move a weight by 1e-6 of the rate, 0.01, per step, and Adam's root by a few times."""
    monkeypatch.setattr(fused, "PAYS", 1)
    found, run = trained(METHODS[name](quantizer))
    expected, _ = trained(METHODS[name](quantizer), compile=False)
    assert "numba path" in repr(run)
    for key, value in expected.items():
        if name in SUMMED and key.startswith("shown"):
            continue  # an ulp of the latent weight may be a step of the grid
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-6 if name in SUMMED else 0)


def test_threads_leave_no_trace(monkeypatch):
    monkeypatch.setattr(fused, "PAYS", 1)
    threads, found = torch.get_num_threads(), []
    for count, share in ((1, 1 << 16), (3, 100)):
        monkeypatch.setattr(fused, "SHARE", share)
        torch.set_num_threads(count)
        try:
            found.append([trained(METHODS[name](sw.intn(3, block=16, levels="full")))[0] for name in ("default", "sampled", "coupled")])
        finally:
            torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["default", "learned scales, latent"])
def test_kernels_follow_scales_that_were_loaded_or_moved(name, monkeypatch):
    """Arrays are kept from step to step, and made anew where their tensors are others: steps from a state taken back have the same bits."""
    monkeypatch.setattr(fused, "PAYS", 1)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, METHODS[name](sw.intn(3, block=16, levels="full")), optimizer)
    train(model, optimizer, batches(2))
    shown, state, ends = weights(model), copy.deepcopy(optimizer.state_dict()), []
    for turn in range(3):
        model.load_state_dict(shown)
        optimizer.load_state_dict(copy.deepcopy(state))
        if turn == 2:
            for one in run._managed:
                one.tensors = {key: tensor.clone() for key, tensor in one.tensors.items()}
        train(model, optimizer, batches(2, seed=1))
        ends.append({**latents(run, model), **{str(k): one.tensors[SCALE].clone() for k, one in enumerate(run._managed)}})
    assert all(torch.equal(ends[0][key], ends[1][key]) and torch.equal(ends[0][key], ends[2][key]) for key in ends[0])
    assert not torch.equal(ends[0]["0"], state["state"][0]["method_tensor_scale"].reshape(-1, 1))
