"""Longer steps: against torch's own parameter groups, with every optimizer whose steps are in proportion to its learning rate."""

import math

import pytest
import torch
from tests.run.training import OPTIMIZERS, QUANTIZED, batches, latents, network, train

import stepwell as sw
from stepwell.train.quantize import recipe

TERMS = 16
Q = sw.int3(block=8)
METHODS = {
    "ste": sw.ste,
    "clipped ste": lambda q: sw.ste(q, clip=0.8),
    "ste + lotion": lambda q: sw.lotion(q, loss_terms=TERMS, forward="nearest"),
    "carried weights": lambda q: recipe(q, steps=20, loss_terms=TERMS)._replace(rate_multiplier=1.0),
}
PAIRS = [  # the penalty needs a second moment
    (method, optimizer)
    for method in METHODS
    for optimizer in OPTIMIZERS
    if ("fused" not in optimizer or "adamw" in optimizer) and ("sgd" not in optimizer or method in ("ste", "clipped ste"))
]


def grouped(model, made, multiplier: float) -> torch.optim.Optimizer:
    """Return an optimizer that has the quantized weights in a group of their own, with that much more learning rate."""
    groups = [{"params": [one for name, one in model.named_parameters() if (name in QUANTIZED) is mine]} for mine in (True, False)]
    optimizer = made(groups)
    optimizer.param_groups[0]["lr"] *= multiplier
    return optimizer


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_a_multiplier_is_a_parameter_group_with_that_much_more_learning_rate(method, optimizer):
    """Latent weights, parameters in float and scales of 20 steps in float64, to rounding errors that grow by a few per step.

    The scales of their own follow the group's rate relative to its largest, which a multiple does not change.
    """
    data, found = batches(20, dtype=torch.float64), []
    for multiplier, made in ((2.5, METHODS[method](Q)), (1.0, sw.faster(METHODS[method](Q), 2.5))):
        model = network(dtype=torch.float64)
        stepper = grouped(model, OPTIMIZERS[optimizer], multiplier)
        run = sw.attach(model, made, stepper)
        train(model, stepper, data)
        found.append(latents(run, model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-12)


class Sharp(torch.optim.SGD):
    """Sharpness-aware minimization: looks at a second place, and steps from the first with the gradient found there."""

    def step(self, closure):
        loss = closure()
        held = [(parameter, parameter.detach().clone()) for group in self.param_groups for parameter in group["params"]]
        with torch.no_grad():
            for parameter, _ in held:
                parameter.add_(parameter.grad, alpha=0.05)
        closure()
        with torch.no_grad():
            for parameter, value in held:
                parameter.copy_(value)
        super().step()
        return loss


def moves(model, optimizer, method, count: int) -> dict[str, torch.Tensor]:
    """Return how far the latent weights come in that many steps with a closure."""
    run = sw.attach(model, method, optimizer)
    before = latents(run, model)
    for inputs, targets in batches(count, dtype=torch.float64):

        def closure(inputs=inputs, targets=targets):
            with torch.enable_grad():
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
            return loss

        optimizer.step(closure)
    return {name: value - before[name] for name, value in latents(run, model).items() if name in QUANTIZED}


def test_a_closure_that_is_called_again_leaves_the_start_of_the_step_where_it_was():
    """Against a parameter group of its own; what the second call sees is not what the step is measured from."""
    found = []
    for multiplier, method in ((2.5, sw.ste(Q)), (1.0, sw.faster(sw.ste(Q), 2.5))):
        model = network(dtype=torch.float64)
        optimizer = grouped(model, lambda parameters: Sharp(parameters, lr=0.05), multiplier)
        found.append(moves(model, optimizer, method, 5))
    for name in QUANTIZED:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_step_is_longer_as_a_whole(search):
    """However many steps it has inside, and wherever its line search has looked last."""
    found = []
    for multiplier in (1, 2):
        model = network(dtype=torch.float64)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=5, line_search_fn=search)
        found.append(moves(model, optimizer, sw.faster(sw.ste(Q), multiplier), 1))
    for name in QUANTIZED:
        assert found[0][name].any()
        torch.testing.assert_close(found[1][name], 2 * found[0][name], rtol=0, atol=1e-12)


OWN_STEPS = {
    "cage": (lambda: sw.cage(Q, pull=1.0), OPTIMIZERS["adamw for-loop"]),
    "a penalty beside SGD": (lambda: sw.fisher(sw.lotion(Q, loss_terms=TERMS, forward="nearest")), OPTIMIZERS["sgd momentum foreach"]),
}


@pytest.mark.parametrize("name", OWN_STEPS)
def test_a_step_that_the_method_takes_itself_is_as_much_longer(name):
    """Against a parameter group of its own, where the method is told the group's rate."""
    found = []
    for multiplier, longer in ((2.5, 1.0), (1.0, 2.5)):
        model = network(dtype=torch.float64)
        optimizer = grouped(model, OWN_STEPS[name][1], multiplier)
        run = sw.attach(model, sw.faster(OWN_STEPS[name][0](), longer), optimizer)
        train(model, optimizer, batches(10, dtype=torch.float64))
        found.append(latents(run, model))
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=0, atol=1e-12)


def test_one_is_the_method_itself():
    """To the last bit: nothing is done then."""
    found = []
    for method in (sw.ste(Q), sw.faster(sw.ste(Q), 1)):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = sw.attach(model, method, optimizer)
        train(model, optimizer, batches(5))
        found.append(latents(run, model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_multipliers_multiply():
    assert sw.faster(sw.faster(sw.ste(Q), 2), 1.5).rate_multiplier == 3


@pytest.mark.parametrize("multiplier", [0, -1.0, math.nan, math.inf, True, "2"])
def test_a_multiplier_is_positive_and_finite(multiplier):
    with pytest.raises(ValueError, match=r"`multiplier` must be positive and finite: got .*1\.5 to 2"):
        sw.faster(sw.ste(Q), multiplier)


def test_a_method_without_latent_weights_is_refused():
    with pytest.raises(ValueError, match=r"lotion trains on the weights themselves.*Set that instead"):
        sw.faster(sw.lotion(Q, loss_terms=TERMS), 2)
    with pytest.raises(TypeError, match="got Quantizer"):
        sw.faster(Q, 2)
