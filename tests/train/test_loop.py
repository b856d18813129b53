"""The plain loop equals the same steps written out; evaluation equals its definition and changes nothing."""

import copy

import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from stepwell.train.data import Images
from stepwell.train.loop import evaluate, fit
from stepwell.train.models import mlp


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [Images(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(count)]


def test_sgd_steps_equal_the_update_by_hand():
    model, steps = mlp((4, 5, 3), seed=0), 4
    twin = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    losses = fit(model, data(steps, 1), optimizer=optimizer, scheduler=LambdaLR(optimizer, lambda step: 1 - step / steps))
    by_hand = []
    for step, (pixels, labels) in enumerate(data(steps, 1)):
        loss = cross_entropy(twin(pixels), labels)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= 0.1 * (1 - step / steps) * gradient
        by_hand.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(by_hand))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_after_step_sees_every_step_once_and_in_order():
    model, seen = mlp((4, 3), seed=0), []
    fit(model, data(3, 0), optimizer=AdamW(model.parameters()), after_step=seen.append)
    assert seen == [1, 2, 3]
    assert fit(model, [], optimizer=AdamW(model.parameters())) == []


def test_evaluate_is_mean_negative_log_likelihood_and_share_of_hits():
    model, (images,) = mlp((4, 3), seed=0), data(1, 5)
    logits = model(images.pixels).detach().double()
    expected = -log_softmax(logits, 1)[torch.arange(6), images.labels].mean()
    score = evaluate(model, images)
    assert abs(score.loss - expected) < 1e-6  # float32 logits of order one
    assert score.accuracy == sum(int(row.argmax()) == label for row, label in zip(logits, images.labels, strict=True)) / 6


def test_evaluate_leaves_mode_and_weights_alone():
    model, (images,) = mlp((4, 3), seed=0), data(1, 5)
    before = copy.deepcopy(model.state_dict())
    for training in (True, False):
        model.train(training)
        evaluate(model, images)
        assert model.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_of_ones_own_replaces_the_cross_entropy():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3.0)
    losses = fit(model, [1.0, 2.0], optimizer=SGD(model.parameters(), lr=0.25), loss=lambda m, target: (m.weight - target).square().sum())
    assert losses == [4.0, 0.0]  # the gradient at 3 is 4, so one step of a quarter lands on 2
