"""torch.distributed.checkpoint: its functions read and load optimizer state through a step of their own, which must not count."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.run.resume_worker import CASES, STEPS, build
from tests.run.training import batches, latents, same, train, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
SOME = [
    "ste, sgd",
    "ste, momentum",
    "ste, fused",
    "ste, frozen",
    "ste, frozen, later",
    "searched, affine",
    "lotion",
    "randomized",
    "learned scale",
    "taught",
]


@pytest.mark.parametrize("case", SOME)
def test_reading_the_state_of_a_fresh_optimizer_changes_nothing(case):
    model, optimizer, run = build(case, seed=0)
    before, held = weights(model), latents(run, model)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(run.steps))
    get_optimizer_state_dict(model, optimizer)
    assert fired == [0]  # torch takes a step to create the state; if it stops doing so, this test has nothing to say
    assert run.steps == 0
    assert same(weights(model), before)
    assert same(latents(run, model), held)


@pytest.mark.parametrize("case", SOME)
def test_run_resumes_through_its_functions(case):
    data = batches(STEPS)
    model, optimizer, run = build(case, seed=0)
    train(model, optimizer, data[:4])
    saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
    train(model, optimizer, data[4:])
    fresh, made, again = build(case, seed=99)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh.load_state_dict(saved[0])
        set_optimizer_state_dict(fresh, made, saved[1])
        train(fresh, made, data[4:])
    assert again.steps == run.steps == STEPS
    assert same(weights(fresh), weights(model))
    assert same(latents(again, fresh), latents(run, model))


@pytest.mark.parametrize("case", SOME)
def test_run_resumes_from_a_checkpoint_folder(case, tmp_path):
    """`dcp.load` writes in place into a dictionary read from the fresh run, latent weights included."""
    data = batches(STEPS)
    model, optimizer, run = build(case, seed=0)
    train(model, optimizer, data[:4])
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=tmp_path)
    train(model, optimizer, data[4:])
    fresh, made, again = build(case, seed=99)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*outside the run.*")
        warnings.filterwarnings("error", message=".*no latent weights.*")
        skeleton = dict(zip(("model", "optimizer"), get_state_dict(fresh, made), strict=True))
        dcp.load(skeleton, checkpoint_id=tmp_path)
        set_state_dict(fresh, made, model_state_dict=skeleton["model"], optim_state_dict=skeleton["optimizer"])
        train(fresh, made, data[4:])
    assert same(weights(fresh), weights(model))
    assert same(latents(again, fresh), latents(run, model))


def test_flattened_state_loses_latent_weights_with_a_warning():
    """Unflattening asks `optimizer.state` for its keys, where ours never are: torch drops them, and the run says so."""
    model, optimizer, _ = build("ste, fused", seed=0)
    train(model, optimizer, batches(2))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert "state.0.weight.latent" in saved
    fresh, made, _ = build("ste, fused", seed=0)
    with pytest.warns(UserWarning, match="no latent weights for 3 parameters.*flattened"):
        set_optimizer_state_dict(fresh, made, saved, options=options)


def test_cases_are_among_those_that_resume():
    assert set(SOME) <= set(CASES)


def test_zero_rate_and_zero_gradients_with_state_are_a_step():
    """Only a step that finds no state is torch's; later ones count, whatever they move."""
    model, optimizer, run = build("ste, fused", seed=0)
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert run.steps == 2
