"""What a method is told: plain numbers for kernels, and the same as 0-dim tensors for everybody else."""

import torch

import stepwell as sw
from stepwell import randomness
from stepwell.run.told import Told


def test_a_context_holds_the_same_numbers_beside_the_weight():
    lr = torch.tensor(0.25)  # as torch's optimizers hold it where a graph is captured
    told = Told(sw.int4(), 7, lr, 64.0, None, {"scale": torch.ones(2, 1)}, 5, "0.weight", 96, {"slope": 0.5}, 1.5, True)
    context = told.context(torch.empty(4))
    numbers = (context.lr, context.loss_terms, context.correction, context.scheduled["slope"])
    assert [number.item() for number in numbers] == [0.25, 64, 1.5, 0.5]
    assert {(number.dtype, number.shape) for number in numbers} == {(torch.float64, torch.Size([]))}
    assert context.key.item() == randomness.stream(5, 7, "0.weight")
    assert (context.step, context.offset, context.carries, context.tensors) == (7, 96, True, told.tensors)
    assert told._replace(correction=None).context(torch.empty(4)).correction is None
    assert told.context(torch.empty(4, device="meta")).loss_terms.is_meta
