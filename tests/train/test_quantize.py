"""quantize_training: which recipe it is, which grid it chooses, and the teacher's loss."""

import copy
import math

import pytest
import torch
from tests.run.training import QUANTIZED, batches, network, train, weights
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw
from stepwell.train.quantize import all_codes, recipe


def started(quantizer, *, optimizer=torch.optim.AdamW, steps=5, **options):
    model = network()
    made = optimizer(model.parameters(), lr=0.01)
    return model, made, sw.quantize_training(model, made, quantizer, steps=steps, loss_terms=64, **options)


@pytest.mark.parametrize(
    ("given", "levels"),
    [
        (sw.int2(block=16), "mid"),
        (sw.int3(block=16), "full"),
        (sw.int4(block=16), "full"),
        (sw.intn(8, block=16), "full"),
        (sw.intn(4, block=16, scale_dtype="e8m0"), "mid"),  # no sign
        (sw.intn(2, block=16, levels="symmetric"), "symmetric"),
        (sw.intn(3, block=16, levels="mid"), "mid"),
        (sw.target("gguf:q4_0"), "full"),
        (sw.ternary(block=16), "symmetric"),
        (sw.nvfp4(), None),
    ],
    ids=str,
)
def test_all_codes_are_used_where_the_levels_were_left_open(given, levels):
    chosen = all_codes(given)
    assert chosen.format.levels == levels
    assert (chosen.format.bits, chosen.block, chosen.scale_dtype) == (given.format.bits, given.block, given.scale_dtype)
    if levels in ("mid", "full"):
        assert len(chosen.format.values) == 2**given.format.bits
    assert all_codes(chosen) == chosen


def test_two_bits_end_on_four_values_per_block():
    model, optimizer, run = started(sw.int2(block=16))
    train(model, optimizer, batches(5))
    for name, encoded in run.finalize().items():
        rows = model.get_parameter(name).detach().reshape(-1, 16)
        assert max(len(row.unique()) for row in rows) == 4
        assert sorted(encoded.codes.unique().tolist()) == [-2, -1, 0, 1]


def test_the_forward_pass_is_rounded_after_four_fifths():
    model, optimizer, run = started(sw.int3(block=16), steps=10)
    for step in range(10):
        with run.deployed():
            rounded = weights(model)
        same = torch.equal(model[0].weight, rounded["0.weight"])
        assert same == (step >= 8)
        train(model, optimizer, batches(10)[step : step + 1])


def test_parts_of_the_recipe():
    method = recipe(sw.int3(block=16), steps=10, loss_terms=64)
    assert method.schedules["slope"](0) == 1
    assert method.schedules["slope"](4) == pytest.approx(0.5)
    assert method.schedules["slope"](8) == 0
    assert method.push is not None
    assert method.gradient is not None
    assert method.loss_terms == 64
    affine = recipe(sw.intn(4, levels="affine"), steps=10, loss_terms=64)
    assert affine.gradient is None  # no scale to learn beside a zero point
    assert affine.push is not None


def test_mapping_of_grids_and_optimizers_without_a_second_moment():
    model = network()
    sgd = torch.optim.SGD(model[0].parameters(), lr=0.05)
    adamw = torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()], lr=0.01)
    grids = {"0": sw.int2(block=16), "2": None, "*": sw.int4(block=16)}
    run = sw.quantize_training(model, [sgd, adamw], grids, steps=4, loss_terms=64)
    losses = train(model, [sgd, adamw], batches(1) * 12)
    assert losses[-1] < losses[0]
    assert "method_tensor_fisher" in sgd.state_dict()["state"][0]
    encoded = run.finalize()
    assert {name: value.quantizer.format.levels for name, value in encoded.items()} == {"0.weight": "mid", "4.weight": "full"}


def test_run_can_be_skipped_in_parts():
    _, _, run = started(sw.int3(block=16), skip=["4"])
    assert list(run.finalize()) == QUANTIZED[:2]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_steps_must_be_the_whole_run(steps):
    with pytest.raises(ValueError, match=r"`steps` must be the number of optimizer steps.*got"):
        started(sw.int3(block=16), steps=steps)


def test_bad_arguments_change_nothing():
    model = network()
    before, optimizer = weights(model), torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="`teacher` is `model` itself"):
        sw.quantize_training(model, optimizer, sw.int3(block=16), steps=5, loss_terms=64, teacher=model)
    with pytest.raises(TypeError, match="`teacher` must be a torch module"):
        sw.quantize_training(model, optimizer, sw.int3(block=16), steps=5, loss_terms=64, teacher="big")
    with pytest.raises(ValueError, match="`loss_terms`"):
        sw.quantize_training(model, optimizer, sw.int3(block=16), steps=5, loss_terms=-1)
    with pytest.raises(TypeError, match="`quantizer` must be a Quantizer"):
        sw.quantize_training(model, optimizer, 3, steps=5, loss_terms=64)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert not optimizer._optimizer_step_pre_hooks


# The teacher.


def test_distillation_is_hintons_formula():
    teacher, temperature, share = nn.Linear(3, 4), 2.0, 0.25
    inputs, logits, targets = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    expected = 0.0
    for x, z, y in zip(inputs, logits, targets, strict=True):
        p = [math.exp(t / temperature) for t in teacher(x).tolist()]
        q = [math.exp(t / temperature) for t in z.tolist()]
        p, q = [a / sum(p) for a in p], [a / sum(q) for a in q]
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected += (1 - share) * cross_entropy(z, y).item() + share * temperature**2 * divergence
    loss = sw.distillation(teacher, weight=share, temperature=temperature)
    assert loss(logits, targets, inputs).item() == pytest.approx(expected / 5, rel=1e-5)


def test_teacher_that_agrees_leaves_half_the_cross_entropy():
    teacher = network(3)
    inputs, targets = torch.randn(4, 7, 32), torch.randint(4, (4, 7))
    logits = teacher(inputs)
    loss = sw.distillation(teacher)(logits, targets, inputs)
    assert loss.item() == pytest.approx(cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / 2, rel=1e-5)


def test_targets_that_do_not_count_do_not_count_for_the_teacher_either():
    teacher, inputs, logits = network(3), torch.randn(6, 32), torch.randn(6, 4)
    targets = torch.tensor([1, -100, 2, 0, -100, 3])
    kept = targets != -100
    loss = sw.distillation(teacher)
    assert loss(logits, targets, inputs).item() == pytest.approx(loss(logits[kept], targets[kept], inputs[kept]).item(), rel=1e-6)


def test_run_has_the_loss_with_its_teacher_in_it():
    teacher = network(1)
    teacher.train()
    model, optimizer, run = started(sw.int3(block=16), teacher=teacher)
    assert not teacher.training
    inputs, targets = torch.randn(8, 32), torch.randint(4, (8,))
    value = run.loss(model(inputs), targets, inputs)
    assert value.item() == pytest.approx(sw.distillation(teacher)(model(inputs), targets, inputs).item(), rel=1e-6)
    value.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises(TypeError, match="needs the model's `inputs`"):
        run.loss(model(inputs), targets)
    _, _, plain = started(sw.int3(block=16))
    assert plain.loss(model(inputs), targets, inputs).item() == pytest.approx(cross_entropy(model(inputs), targets).item())


@pytest.mark.parametrize(
    ("options", "message"), [({"weight": 1.5}, "`weight`"), ({"weight": math.nan}, "`weight`"), ({"temperature": 0.0}, "`temperature`")]
)
def test_bad_distillation_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        sw.distillation(copy.deepcopy(network()), **options)
