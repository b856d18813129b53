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


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if "fused" not in name or "adamw" in name])
@pytest.mark.parametrize("method", METHODS)
def test_a_multiplier_is_a_parameter_group_with_that_much_more_learning_rate(method, optimizer):
    """Latent weights, parameters in float and scales of 20 steps in float64, to rounding errors that grow by a few per step.

    The scales of their own follow the group's rate relative to its largest, which a multiple does not change.
    """
    if "sgd" in optimizer and method != "ste" and method != "clipped ste":
        pytest.skip("the penalty needs a second moment")
    data, found = batches(20, dtype=torch.float64), []
    for multiplier, made in ((2.5, METHODS[method](Q)), (1.0, sw.faster(METHODS[method](Q), 2.5))):
        model = network(dtype=torch.float64)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        rate = stepper.param_groups[0]["lr"]
        chosen = [parameter for name, parameter in model.named_parameters() if name in QUANTIZED]
        rest = [parameter for name, parameter in model.named_parameters() if name not in QUANTIZED]
        stepper = OPTIMIZERS[optimizer]([{"params": chosen, "lr": multiplier * rate}, {"params": rest}])
        run = sw.attach(model, made, stepper)
        train(model, stepper, data)
        found.append(latents(run, model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-12)


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
