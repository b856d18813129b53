"""Bad input gets one clear error that names the parameter, the received value and the next step, before anything changes."""

import copy
import math
import warnings

import pytest
import torch
from tests.run.training import batches, network, ones, same, train, weights
from torch import nn
from torch.nn.utils import parametrizations

import stepwell as sw

Q = sw.int3(block=16)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def refused(model, method, optimizers, message, *, error=ValueError, **options):
    """Check that `attach` raises with a message and leaves model and optimizers as they were."""
    before = copy.deepcopy(model.state_dict())
    listed = optimizers if isinstance(optimizers, list) else [optimizers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            sw.attach(model, method, optimizers, **options)
    for key, value in model.state_dict().items():
        assert (
            torch.equal(
                value,
                before[key],
            )
            or (value != value).any()
        ), key
    for optimizer in listed:
        if isinstance(optimizer, torch.optim.Optimizer):
            assert not any("stepwell" in hook.__module__ for hook in optimizer._optimizer_step_pre_hooks.values())
            assert not optimizer.state


def poisoned(value):
    model = network()
    model[2].weight.data[3, 4] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite(value):
    model = poisoned(value)
    refused(model, sw.ste(Q), adamw(model), rf"`2.weight` must be finite: got 1 of 1536 elements such as {value}.*quantizing")


def test_integer_and_empty_weights():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int32), requires_grad=False)
    refused(model, sw.ste(Q), adamw(model), r"`1.weight` must be a float.*got torch.int32.*skip", error=TypeError)
    model[1].weight = nn.Parameter(torch.ones(0, 16))
    refused(model, sw.ste(Q), adamw(model), r"'1.weight': a weight must have elements: got shape \(0, 16\).*skip")


def test_block_that_does_not_divide():
    model = network()
    refused(model, sw.ste(sw.int4(block=32)), adamw(model), r"'2.weight': `block` must divide.*block=32.*\(32, 48\).*48 elements.*skip")


def test_axis_that_the_weight_does_not_have():
    model = network()
    refused(model, sw.ste(sw.intn(4, block=16, axis=2)), adamw(model), r"'0.weight': `axis` must be a dimension.*axis=2.*\(48, 32\)")


def test_parameter_that_no_optimizer_holds():
    model = network()
    refused(model, sw.ste(Q), torch.optim.AdamW(model[0].parameters()), r"'2.weight' is selected and trained, but no given optimizer.*list")


def test_parameter_that_two_optimizers_hold():
    model = network()
    refused(model, sw.ste(Q), [adamw(model), torch.optim.SGD([model[2].weight], lr=0.1)], "'2.weight' is held by 2 optimizers")


def test_nothing_selected():
    model = nn.Sequential(nn.Embedding(10, 16), nn.LayerNorm(16))
    refused(model, sw.ste(Q), adamw(model), r"(?s)nothing is selected.*0.weight.*embedding")


def test_names_that_match_nothing():
    model = network()
    refused(model, sw.ste(Q), adamw(model), "'head' matches no parameter.*0.weight", skip=["head"])
    refused(model, {"mlp.*": sw.ste(Q)}, adamw(model), r"'mlp.\*' matches no parameter")
    refused(model, sw.ste(Q), adamw(model), r"`skip` must be a sequence of names: got the string", skip="0", error=TypeError)


def test_two_runs_on_one_optimizer():
    model = network()
    optimizer = adamw(model)
    run = sw.attach(model, sw.ste(Q), optimizer)
    before = weights(model)
    with pytest.raises(ValueError, match=r"`optimizer`: this AdamW already has a run. Call its `finalize\(\)`"):
        sw.attach(model, sw.ste(Q), optimizer)
    assert same(weights(model), before)
    run.detach()
    sw.attach(model, sw.ste(Q), optimizer)


def test_optimizers_that_are_none():
    model = network()
    refused(model, sw.ste(Q), [], "at least one optimizer: got an empty list")
    refused(model, sw.ste(Q), [torch.optim.lr_scheduler.ConstantLR], "must be a torch optimizer.*got type", error=TypeError)
    optimizer = adamw(model)
    refused(model, sw.ste(Q), [optimizer, optimizer], "AdamW twice")


@pytest.mark.parametrize("method", [Q, "ste", sw.ste], ids=["quantizer", "string", "factory"])
def test_something_that_is_no_method(method):
    model = network()
    refused(model, method, adamw(model), "`method` must be a method such as", error=TypeError)
    refused(model, {"0": sw.ste(Q), "*": method}, adamw(model), "`method` must be a method such as", error=TypeError)


def test_lotion_without_a_second_moment():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    refused(model, sw.lotion(Q, loss_terms=64), optimizer, r"'0.weight': lotion takes its curvature.*SGD does not keep.*`curvature=`")


def test_lotion_without_a_first_moment():
    model = network()
    refused(model, sw.lotion(Q, loss_terms=64), adamw(model, betas=(0.0, 0.99)), r"'0.weight'.*betas=\(0.0, 0.99\).*`curvature=`")


def test_given_curvature_needs_no_first_moment():
    """What the last message advises works: the penalty is stepped down after the optimizer."""
    model = network()
    optimizer = adamw(model, betas=(0.0, 0.99))
    run = sw.attach(model, sw.lotion(Q, curvature=ones(model)), optimizer)
    train(model, optimizer, batches(3))
    assert "penalty after the step" in repr(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("2.weight"), r"`curvature` holds nothing for '2.weight'"),
        (
            lambda given: given.update({"2.weight": torch.ones(3)}),
            r"`curvature` of '2.weight' must be a tensor of shape \(32, 48\): got \(3,\)",
        ),
        (lambda given: given.update({"2.weight": 1.0}), r"must be a tensor of shape \(32, 48\): got float"),
        (lambda given: given["2.weight"].fill_(-1), r"finite and not negative: got -1.0"),
        (lambda given: given["2.weight"].fill_(math.nan), r"finite and not negative: got nan"),
    ],
    ids=["missing", "shape", "number", "negative", "nan"],
)
def test_curvature_that_does_not_fit(change, message):
    model = network()
    given = ones(model)
    change(given)
    refused(model, sw.lotion(Q, curvature=given), torch.optim.SGD(model.parameters(), lr=0.1), message)


def test_weight_norm_is_named_with_the_reason():
    model = network()
    model[2] = parametrizations.weight_norm(model[2])
    refused(model, sw.ste(Q), adamw(model), r"'2.weight' cannot be quantized.*parametrize computes it.*skip")
    run = sw.attach(model, sw.ste(Q), adamw(model), skip=["2"])
    assert len(run.health().parameters) == 2


def test_lora_is_named_with_the_reason():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(32, 32)
            self.lora_A, self.lora_B = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    model = nn.Sequential(Adapted())
    refused(model, sw.ste(sw.int4(block=4)), adamw(model), r"'0.base_layer.weight' cannot be quantized: LoRA adds.*skip")


def test_model_without_values():
    with torch.device("meta"):
        model = nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"'weight' is on the meta device.*Materialize"):
        sw.attach(model, sw.ste(Q), optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "`start` must be a whole number of steps, 0 or more: got -1"),
        ({"start": 1.5}, "`start`.*got 1.5"),
        ({"start": True}, "`start`.*got True"),
        ({"refit": 0}, "`refit` must be a whole number of steps, 1 or more: got 0"),
    ],
    ids=str,
)
def test_counts_of_steps(options, message):
    model = network()
    refused(model, sw.ste(Q), adamw(model), message, **options)


# At the step: what `attach` cannot know yet.


def refused_step(model, optimizer, error, message):
    inputs, targets = batches(1)[0]
    nn.functional.mse_loss(model(inputs), targets).backward()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same(weights(model), before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[index][key], value) for index, entry in state.items() for key, value in entry.items())


def test_lotion_without_loss_terms_raises_at_the_step():
    """At any step: the message tells how to set them, and setting them there and then goes on."""
    model = network()
    optimizer = adamw(model)
    run = sw.attach(model, {"0": sw.ste(Q), "*": sw.lotion(Q, forward="nearest")}, optimizer)
    refused_step(model, optimizer, RuntimeError, r"`loss_terms` is not set.*run.loss_terms")
    run.loss_terms = 64
    train(model, optimizer, batches(2))
    assert run.steps == 2


@pytest.mark.parametrize("terms", [math.nan, math.inf, 0, -3, "64", True])
def test_loss_terms_that_are_no_positive_number(terms):
    model = network()
    optimizer = adamw(model)
    run = sw.attach(model, sw.lotion(Q, loss_terms=64, forward="nearest"), optimizer)
    train(model, optimizer, batches(2))
    for given in (terms, lambda step: terms):
        run.loss_terms = given
        refused_step(model, optimizer, ValueError, "`loss_terms` must be a positive number")


def test_loss_terms_may_follow_the_step():
    """A function of the step: constant, it is the number; the run's wins over the method's."""
    results = []
    for method, on_run in ((None, lambda step: 64.0), (64, None), (3, 64)):
        model = network()
        optimizer = adamw(model)
        run = sw.attach(model, sw.lotion(Q, loss_terms=method), optimizer)
        run.loss_terms = on_run
        train(model, optimizer, batches(3))
        results.append(weights(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_weight_that_turned_nan_is_named_at_finalize_and_nothing_changes():
    model = network()
    optimizer = adamw(model)
    run = sw.attach(model, sw.ste(Q), optimizer)
    train(model, optimizer, batches(1))
    with run.latent():
        model[2].weight.data[0, 0] = math.nan
    before = weights(model)
    with pytest.raises(ValueError, match=r"`2.weight` must be finite: got 1 of 1536"):
        run.finalize()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert run.health().sick == ("2.weight",)
