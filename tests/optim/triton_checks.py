"""The Triton kernel in Triton's interpreter, on the CPU, against this machine's other kernel; `test_triton` runs this in its own process.

It is the same arithmetic but for instructions that multiply and add at once and for the order of sums over a block. A moment or weight
differs by a few units in the last place of what was added up. The penalty's sum over a block of n differs by n 2^-24 of its terms, on top
of which one weight per block receives it: 2e-6 of the largest value bounds both for n up to 1024. A weight within that of a border may be
rounded to the other side, so of the deployed weights one may differ.
"""

import pytest
import torch
from tests.cases import gaussian, seeded

from stepwell.formats import integer
from stepwell.optim import AdamW, engines
from stepwell.optim.task import Task, numbers_of

BLOCKS = (1, 3, 16, 32, 48, 128, 700)
GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
TASKS = {
    "ste": Task(integer(4, "symmetric"), 0),
    "ste, full": Task(integer(3, "full"), 0),
    "lotion": Task(integer(4, "symmetric"), 0, None, None, 64.0, 1.0, True, 10.0),
    "lotion, full": Task(integer(2, "full"), 0, None, None, 64.0, 1.0, True, 10.0),
    "lotion, detached": Task(integer(8, "symmetric"), 0, None, None, 64.0, 0.5, False, 10.0),
}


@pytest.fixture
def triton_engine():
    """The kernel; TRITON_INTERPRET must be set before anything imports triton."""
    return engines.load(engines.ASKED)


def reference():
    engine = engines.load("c") or engines.load("numba")
    if engine is None:
        pytest.skip("this machine has no other kernel to compare with")
    return engine


def arrays_of(rows, block, *, shows, held):
    generator, shape = seeded(block), (rows, block)
    weight = gaussian(*shape, seed=block)
    weight[0] = 0
    scales = torch.rand(rows, 1, generator=generator) * 0.3 + 0.01 if held else None
    shown = torch.zeros(shape) if shows else None
    second = torch.rand(shape, generator=generator) ** 4
    return engines.Arrays(shown, weight, gaussian(*shape, seed=block + 1), gaussian(*shape, seed=block + 2) * 0.1, second, scales)


def copied(arrays):
    return engines.Arrays(*(None if one is None else one.clone() for one in arrays))


@pytest.mark.parametrize("held", [False, True], ids=["fitted", "held"])
@pytest.mark.parametrize("shows", [False, True], ids=["latent", "deployed"])
@pytest.mark.parametrize("name", TASKS)
def test_triton_kernel_does_what_the_other_kernels_do(triton_engine, name, shows, held):
    other = reference()
    for block in BLOCKS:
        ours = arrays_of(9, block, shows=shows, held=held)
        theirs = copied(ours)
        task = TASKS[name]._replace(block=block, scales=ours.scales, latent=ours.weight if shows else None)
        numbers = numbers_of(GROUP, 5, task)
        engines.run(triton_engine, ours, block, numbers)
        engines.run(other, theirs, block, numbers)
        for key in ("first", "second", "weight"):
            one, two = getattr(ours, key), getattr(theirs, key)
            assert torch.allclose(one, two, rtol=2e-6, atol=2e-6 * float(two.abs().max())), (block, key)
        if shows:
            apart = (ours.shown - theirs.shown).abs() > 1e-5 * theirs.shown.abs().max()
            assert int(apart.sum()) <= 1, block


@pytest.mark.parametrize("change", [{"maximize": True}, {"betas": (0.3, 0.9)}, {"betas": (0.5, 0.9), "weight_decay": 0.0}], ids=str)
def test_settings_reach_the_kernel(triton_engine, change):
    other, ours = reference(), arrays_of(5, 32, shows=True, held=False)
    theirs = copied(ours)
    numbers = numbers_of({**GROUP, **change}, 3, TASKS["lotion"]._replace(block=32))
    engines.run(triton_engine, ours, 32, numbers)
    engines.run(other, theirs, 32, numbers)
    for key in ("first", "second", "weight"):
        torch.testing.assert_close(getattr(ours, key), getattr(theirs, key), rtol=2e-6, atol=2e-6)


def test_nothing_chooses_the_kernel_by_itself(triton_engine, monkeypatch):
    engines.best.cache_clear()
    monkeypatch.delenv(engines.VARIABLE, raising=False)
    assert engines.best() is None or engines.best().name in engines.NAMES
    monkeypatch.setenv(engines.VARIABLE, "triton")
    engines.best.cache_clear()
    assert engines.best() is triton_engine
    weight = torch.nn.Parameter(torch.ones(4, triton_engine.longest + 1))
    optimizer = AdamW([weight])
    assert optimizer.serves(weight, optimizer.param_groups[0], 32)
    assert not optimizer.serves(weight, optimizer.param_groups[0], triton_engine.longest + 1)
    monkeypatch.undo()
    engines.best.cache_clear()
