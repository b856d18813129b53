"""A run stopped between any two optimizer steps and resumed in a fresh process ends with the same bits as one that went on."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.run.resume_worker import CASES, STEPS, build
from tests.run.training import QUANTIZED, batches, network, same, train, weights

import stepwell as sw

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Save every case before every step, resume all of them in one fresh process, and return what the uninterrupted ones end with."""
    folder, ends = tmp_path_factory.mktemp("resume"), {}
    data = batches(STEPS)
    for number, case in enumerate(CASES):
        model, optimizer, run = build(case, seed=0)
        for step in range(STEPS):
            saved = {"case": case, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, folder / f"{number}-{step}.pt")
            train(model, optimizer, data[step : step + 1])
        ended = copy.deepcopy({"weights": model.state_dict(), "optimizer": optimizer.state_dict()})
        ends[case] = {**ended, "codes": {name: encoded.codes for name, encoded in run.finalize().items()}}
    command = [sys.executable, "-m", "tests.run.resume_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, ends


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_with_the_same_bits(resumed, case, step):
    folder, ends = resumed
    found = torch.load(folder / f"{list(CASES).index(case)}-{step}.end", weights_only=True)
    assert same(found["weights"], ends[case]["weights"])
    assert same(flat(found["optimizer"]), flat(ends[case]["optimizer"]))
    assert same(found["codes"], ends[case]["codes"])


def flat(state):
    return {f"{index}.{key}": value for index, entry in state["state"].items() for key, value in entry.items() if value is not None}


@pytest.mark.parametrize("case", CASES)
def test_saving_does_not_change_the_run_it_saves(resumed, case):
    model, optimizer, _run = build(case, seed=0)
    train(model, optimizer, batches(STEPS))
    assert same(weights(model), {name: resumed[1][case]["weights"][name] for name in weights(model)})


def test_draws_differ_from_step_to_step_and_by_seed():
    """Else the equality of the randomized case would say little."""
    q, shown = sw.int3(block=16), []
    from tests.run.throwaway import randomized

    for seed in (0, 1):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sw.attach(model, randomized(q), optimizer, seed=seed)
        for _ in range(2):
            shown.append(weights(model)["0.weight"])
            train(model, optimizer, batches(1))
    for one in range(4):
        for two in range(one):
            differing = (shown[one] != shown[two]).float().mean()
            assert 0.1 < differing < 0.6  # two draws differ with probability 2 D (1 - D), a third on average over even places


@pytest.mark.parametrize("step", range(5))
def test_two_optimizers_and_a_frozen_weight_resume(step):
    """Each optimizer's dictionary carries its own parameters; the frozen weight's latent travels with the first. In one process."""

    def build(seed):
        model = network(seed)
        model[2].weight.requires_grad_(False)
        made = [torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9), torch.optim.AdamW([model[4].weight, model[4].bias], lr=0.02)]
        methods = {"0": sw.ste(sw.int3(block=16)), "2": sw.ste(sw.intn(3, block=16, levels="affine")), "*": sw.lotion(sw.int2(block=16))}
        run = sw.attach(model, methods, made, start=2)
        run.loss_terms = lambda step: 10.0 + step
        return model, made, run

    data = batches(5)
    model, made, run = build(0)
    train(model, made, data[:step])
    saved = copy.deepcopy([model.state_dict(), *(optimizer.state_dict() for optimizer in made)])
    train(model, made, data[step:])
    fresh, others, again = build(7)
    fresh.load_state_dict(saved[0])
    for optimizer, state in zip(others, saved[1:], strict=True):
        optimizer.load_state_dict(state)
    train(fresh, others, data[step:])
    assert same(weights(fresh), weights(model))
    found, expected = again.finalize(), run.finalize()
    assert list(found) == list(expected) == QUANTIZED
    assert all(torch.equal(found[key].codes, expected[key].codes) and torch.equal(found[key].scales, expected[key].scales) for key in found)


# What a state dictionary may hold instead.


def stepped(method=None, seed=0, width=16):
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, method or sw.ste(sw.int3(block=width)), optimizer)
    train(model, optimizer, batches(2))
    return model, optimizer, run


def untouched_by(action, model, optimizer, message, error=ValueError):
    """Check that an action is refused with a message before anything changes."""
    before, state = weights(model), copy.deepcopy(flat(optimizer.state_dict()))
    with pytest.raises(error, match=message):
        action()
    assert same(weights(model), before)
    assert same(flat(optimizer.state_dict()), state)


def test_narrowed_latents_are_refused():
    _, saved, _ = stepped()
    state = copy.deepcopy(saved.state_dict())
    state["state"][0]["latent"] = state["state"][0]["latent"].bfloat16()
    model, optimizer, _ = stepped(seed=3)
    untouched_by(lambda: optimizer.load_state_dict(state), model, optimizer, r"latent weight of '0.weight' was narrowed to torch.bfloat16")


def test_latents_of_another_shape_are_refused():
    _, saved, _ = stepped()
    state = copy.deepcopy(saved.state_dict())
    state["state"][2]["latent"] = torch.zeros(3, 3)
    model, optimizer, _ = stepped(seed=3)
    untouched_by(lambda: optimizer.load_state_dict(state), model, optimizer, r"'2.weight' has shape \(3, 3\): expected \(32, 48\)")


def test_searched_scales_of_another_block_are_refused():
    method = {width: sw.ste(sw.intn(3, block=width, scale="mse")) for width in (8, 16)}
    _, saved, _ = stepped(method[16])
    model, optimizer, _ = stepped(method[8], seed=3)
    state = copy.deepcopy(saved.state_dict())
    untouched_by(lambda: optimizer.load_state_dict(state), model, optimizer, r"'method_fit_scale' of '0.weight' has shape \(48, 2, 1\)")


def test_state_of_other_groups_raises_torchs_own_error():
    _, saved, _ = stepped()
    state = copy.deepcopy(saved.state_dict())
    state["param_groups"][0]["params"].pop()
    model, optimizer, _ = stepped(seed=3)
    untouched_by(lambda: optimizer.load_state_dict(state), model, optimizer, "doesn't match the size")


def test_state_without_latents_warns_and_goes_on_from_the_model():
    """The state of plain training: moments are taken, latent weights stay what they were at `attach`, not what they round to."""
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, plain, batches(2))
    before, state = weights(model), copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, sw.ste(sw.int3(block=16)), optimizer)
    with pytest.warns(UserWarning, match=r"holds no latent weights for 3 parameters such as '0.weight'") as caught:
        optimizer.load_state_dict(state)
    assert len(caught) == 1
    with run.latent():
        assert same(weights(model), before)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], plain.state[model[0].weight]["exp_avg"])


def test_state_of_more_parameters_warns_that_latents_are_dropped():
    _, saved, _ = stepped()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sw.attach(model, sw.ste(sw.int3(block=16)), optimizer, skip=["2"])
    with pytest.warns(UserWarning, match="latent weights for 1 parameters that this run does not manage"):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))


@pytest.mark.parametrize("first", ["ste", "lotion"])
def test_method_may_change_at_a_checkpoint(first):
    """From STE to LOTION the latent weights become the weights; from LOTION to STE the weights become latent, with a warning."""
    methods = {"ste": sw.ste(sw.int3(block=16)), "lotion": sw.lotion(sw.int3(block=16), loss_terms=64)}
    model, saved, run = stepped(methods.pop(first))
    state = copy.deepcopy(saved.state_dict())
    with run.latent():
        expected = weights(model)
    fresh = network(9)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    (second,) = methods.values()
    again = sw.attach(fresh, second, optimizer)
    fresh.load_state_dict(model.state_dict())
    if first == "ste":
        optimizer.load_state_dict(state)
    else:
        with pytest.warns(UserWarning, match="no latent weights"):
            optimizer.load_state_dict(state)
    with again.latent():
        assert same(weights(fresh), expected)


def test_state_loads_into_an_optimizer_without_a_run():
    """What we add is not in anyone's way: a plain optimizer trains on with a state that a run saved."""
    _, saved, _ = stepped()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.load_state_dict(saved.state_dict())
    losses = train(model, optimizer, batches(2))
    assert losses[1] < losses[0] * 2
