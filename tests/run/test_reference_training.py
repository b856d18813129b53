"""Training through the optimizer step equals training written out in plain autograd."""

import pytest
import torch
from tests.reference.lotion import AdamW
from tests.reference.lotion import penalty as slow_penalty
from tests.reference.ste import Round
from tests.reference.ste import losses as reference_losses
from tests.run.training import OPTIMIZERS, QUANTIZED, batches, latents, network, ones, same, train, weights
from torch.func import functional_call
from torch.nn.functional import mse_loss

import stepwell as sw

BLOCK, TERMS = 16, 64  # loss terms: 16 rows of 4 outputs


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("optimizer", ["adamw for-loop", "adamw foreach", "adamw fused", "stepwell adamw", "sgd momentum foreach"])
def test_ste_equals_plain_straight_through_bit_for_bit(optimizer, clip):
    """0.8: clipping at the whole range would never bind, since the largest weight of a block sets it."""
    model, reference, data = network(), network(), batches(100)
    ours, theirs = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](reference.parameters())
    run = sw.attach(model, sw.ste(sw.int3(block=BLOCK), clip=clip), ours)
    found = train(model, ours, data)
    expected = reference_losses(reference, theirs, data, mse_loss, names=QUANTIZED, top=3, block=BLOCK, clip=clip)
    assert found == expected
    assert found[-1] != found[0]
    assert same(latents(run, model), weights(reference))


@pytest.mark.parametrize("forward", ["latent", "nearest"])
def test_lotion_equals_adamw_written_out(forward):
    """Rounding errors of 1e-16 per step grow along the trajectory; sixty steps stay below 1e-10 of weights of order one."""
    quantizer, strength = sw.int3(block=BLOCK), 1.5
    model, reference, data = network(dtype=torch.float64), network(dtype=torch.float64), batches(60, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, sw.lotion(quantizer, strength=strength, loss_terms=TERMS, forward=forward), optimizer)
    train(model, optimizer, data)

    names, held = zip(*reference.named_parameters(), strict=True)
    written = AdamW([parameter.data for parameter in held], lr=0.01)

    def force(index, weight, curvature):
        if names[index] not in QUANTIZED:
            return 0.0
        rows = weight.reshape(-1, BLOCK).clone().requires_grad_()
        (found,) = torch.autograd.grad(slow_penalty(rows, curvature.reshape(-1, BLOCK), quantizer), rows)
        bound = 10 * (curvature.sqrt() + 1e-8)  # the penalty pushes with at most ten root mean square gradients
        return (strength * TERMS * found.reshape(weight.shape)).clamp(-bound, bound)

    for inputs, targets in data:
        seen = {name: Round.apply(p, 3, BLOCK, None) for name, p in zip(names, held, strict=True) if name in QUANTIZED}
        value = mse_loss(functional_call(reference, seen if forward == "nearest" else {}, (inputs,)), targets)
        written.step([gradient.detach() for gradient in torch.autograd.grad(value, held)], force)
    found, expected = latents(run, model), weights(reference)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)
    plain = network(dtype=torch.float64)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=0.01), data)
    assert (found["0.weight"] - weights(plain)["0.weight"]).abs().max() > 1e-3  # the penalty does something


def test_given_curvature_steps_down_the_penalty_after_sgd():
    quantizer, lr = sw.int3(block=BLOCK), 0.05
    model, reference, data = network(dtype=torch.float64), network(dtype=torch.float64), batches(30, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run = sw.attach(model, sw.lotion(quantizer, strength=0.5, curvature=ones(model)), optimizer)
    assert "penalty after the step" in repr(run)
    train(model, optimizer, data)
    for inputs, targets in data:
        held = dict(reference.named_parameters())
        gradients = torch.autograd.grad(mse_loss(reference(inputs), targets), list(held.values()))
        for (name, parameter), gradient in zip(held.items(), gradients, strict=True):
            parameter.data.sub_(lr * gradient)
            if name in QUANTIZED:
                rows = parameter.data.reshape(-1, BLOCK).clone().requires_grad_()
                (force,) = torch.autograd.grad(slow_penalty(rows, torch.ones_like(rows), quantizer), rows)
                parameter.data.sub_(lr * 0.5 * force.reshape(parameter.shape))
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=0, atol=1e-12)


def test_penalty_leaves_the_second_moment_alone():
    """With gradients that do not depend on the weights, the second moment is that of plain training, to the last bit."""
    moments = []
    for method in (None, sw.lotion(sw.int2(block=BLOCK), strength=5.0, loss_terms=1e6)):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if method is not None:
            sw.attach(model, method, optimizer)
        for step in range(5):
            for k, parameter in enumerate(model.parameters()):
                parameter.grad = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32) * (k + 1) + step).reshape(parameter.shape)
            optimizer.step()
        moments.append({key: optimizer.state[model[0].weight][key].clone() for key in ("exp_avg", "exp_avg_sq")})
    assert torch.equal(moments[0]["exp_avg_sq"], moments[1]["exp_avg_sq"])
    assert not torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
