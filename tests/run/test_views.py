"""What one can look at and take out of a run: deployed and latent weights, finalize, detach, repr."""

import copy

import pytest
import torch
from tests.cases import METHODS as EVERY
from tests.run.throwaway import everything
from tests.run.training import QUANTIZED, batches, latents, network, same, train, weights

import stepwell as sw

Q = sw.int3(block=16)
HOOKS = [
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
]
METHODS = {
    "ste": sw.ste(Q),
    "lotion": sw.lotion(Q, loss_terms=64),
    "searched": sw.ste(sw.intn(3, block=8, scale="mse", levels="affine")),
    **everything(Q),
    **{f"every method: {name}": make(Q) for name, make in EVERY.items()},
}
every_method = pytest.mark.parametrize("name", METHODS)


def stepped(name="ste", steps=3, **options):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    run = sw.attach(model, METHODS[name], optimizer, **options)
    train(model, optimizer, batches(steps))
    return model, optimizer, run


@every_method
def test_finalize_leaves_what_it_returns_and_no_hook(name):
    model, optimizer, run = stepped(name)
    with run.deployed():
        deployed = weights(model)
    encoded = run.finalize()
    assert list(encoded) == QUANTIZED
    for key, value in encoded.items():
        assert torch.equal(model.get_parameter(key), value.decode())
        assert torch.equal(model.get_parameter(key), deployed[key])
        assert value.codes.shape == model.get_parameter(key).shape
    assert not any(getattr(optimizer, hooks) for hooks in HOOKS)
    assert all("latent" not in entry for entry in optimizer.state_dict()["state"].values())
    with pytest.raises(RuntimeError, match="this run has ended"):
        run.finalize()


def test_training_after_finalize_is_plain():
    model, optimizer, run = stepped()
    run.finalize()
    reference = network()
    reference.load_state_dict(weights(model))
    other = torch.optim.AdamW(reference.parameters(), lr=0.02)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, batches(3)) == train(reference, other, batches(3))


def test_finalized_weights_go_through_a_file(tmp_path):
    model, _, run = stepped("searched")
    sw.save(run.finalize(), tmp_path / "codes.safetensors")
    for key, value in sw.load(tmp_path / "codes.safetensors").items():
        assert torch.equal(value.decode(), model.get_parameter(key))


@every_method
@pytest.mark.parametrize("keep", ["latent", "deployed"])
def test_detach_keeps_what_it_is_told_to(name, keep):
    model, optimizer, run = stepped(name)
    expected = latents(run, model) if keep == "latent" else weights(model)
    run.detach(keep=keep)
    assert same(weights(model), expected)
    assert not any(getattr(optimizer, hooks) for hooks in HOOKS)


def test_detach_and_attach_again_goes_on_where_it_was():
    """With the latent weights in the model a second run on the same optimizer continues the first (no draws, no searched scales)."""
    model, optimizer, run = stepped()
    run.detach()
    again = sw.attach(model, METHODS["ste"], optimizer)
    train(model, optimizer, batches(5)[3:])
    reference, _, first = stepped(steps=5)
    assert same(latents(again, model), latents(first, reference))


def test_detach_refuses_another_keep_before_anything_changes():
    model, _, run = stepped()
    before = weights(model)
    with pytest.raises(ValueError, match="`keep` must be 'latent' or 'deployed': got 'weights'"):
        run.detach(keep="weights")
    assert same(weights(model), before)
    run.health()  # still alive


@every_method
@pytest.mark.parametrize("start", [0, 9], ids=["begun", "before its start"])
def test_deployed_shows_grid_weights_and_restores(name, start):
    model, optimizer, run = stepped(name, start=start)
    before = weights(model)
    with run.deployed():
        inside = weights(model)
        for key in QUANTIZED:
            grid = METHODS[name].quantizer
            assert all(len(row.unique()) <= len(grid.format.values) for row in inside[key].reshape(-1, grid.block))
        assert torch.equal(inside["0.bias"], before["0.bias"])
    assert same(weights(model), before)
    train(model, optimizer, batches(1))
    clean, other, _ = stepped(name, start=start)
    train(clean, other, batches(1))
    assert same(weights(model), weights(clean))  # looking changes nothing


@pytest.mark.parametrize("name", ["ste", "lotion", "annealed", "searched"])
@pytest.mark.parametrize("view", ["deployed", "latent"])
def test_exception_inside_a_view_restores(name, view):
    model, _, run = stepped(name)
    before, held = weights(model), latents(run, model)
    with pytest.raises(KeyboardInterrupt), getattr(run, view)():
        raise KeyboardInterrupt
    assert same(weights(model), before)
    assert same(latents(run, model), held)


def test_looking_at_latent_weights_changes_nothing():
    """Searched scales too stay what they were; they are searched again every `refit` steps, not at every look."""
    results = []
    for look in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        run = sw.attach(model, METHODS["searched"], optimizer, refit=100)
        for pair in batches(4):
            train(model, optimizer, [pair])
            if look:
                latents(run, model)
        results.append(weights(model))
    assert same(*results)


def test_what_is_written_to_latent_weights_is_kept():
    model, _, run = stepped()
    with run.latent():
        model[0].weight.data.mul_(0.5)
        expected = weights(model)
    assert same(latents(run, model), expected)
    assert torch.equal(model[0].weight, Q(expected["0.weight"]))


def test_step_and_load_inside_a_view_are_refused():
    model, optimizer, run = stepped()
    before, state = weights(model), optimizer.state_dict()
    for view in (run.deployed, run.latent):
        with view():
            inside = weights(model)
            with pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside"):
                optimizer.step()
            with pytest.raises(RuntimeError, match=r"load_state_dict\(\) inside"):
                optimizer.load_state_dict(state)
            with pytest.raises(RuntimeError, match=r"inside .*leave the block first"):
                run.finalize()
            with pytest.raises(RuntimeError, match=r"inside .*leave the block first"):
                run.detach()
            with pytest.raises(RuntimeError, match="leave the first block"), run.latent():
                pass
            assert same(weights(model), inside)
    assert same(weights(model), before)
    assert run.steps == 3
    train(model, optimizer, batches(1))
    assert run.steps == 4


def test_learned_scales_train_and_are_what_is_finalized():
    model, optimizer, run = stepped("learned scale", steps=1)
    first = optimizer.state_dict()["state"][0]["method_tensor_scale"].clone().reshape(-1, 1)
    losses = train(model, optimizer, batches(1) * 60)
    last = optimizer.state_dict()["state"][0]["method_tensor_scale"].clone().reshape(-1, 1)
    encoded = run.finalize()["0.weight"]
    assert losses[-1] < 0.5 * losses[0]
    assert (last != first).all()
    assert torch.equal(encoded.scales.reshape(-1, 1), last)
    assert not torch.equal(encoded.scales, Q.scale(model[0].weight.detach()))  # not what the rule would fit


def test_annealed_forward_ends_on_the_grid():
    model, optimizer, run = stepped("annealed", steps=2)
    assert not torch.equal(model[0].weight, Q(model[0].weight.detach()))
    train(model, optimizer, batches(2))
    assert torch.equal(model[0].weight, Q(latents(run, model)["0.weight"]))


@pytest.mark.parametrize(("name", "optimizer"), [("pulled", torch.optim.SGD), ("pulled by curvature", torch.optim.AdamW)])
def test_prox_brings_weights_to_the_grid(name, optimizer):
    model = network()
    made = optimizer(model.parameters(), lr=0.01)
    run = sw.attach(model, METHODS[name], made)
    before = run.health().total.distance
    train(model, made, batches(1) * 100)
    assert run.health().total.distance < 0.5 * before


def test_teacher_pulls_back_to_where_training_began():
    distances = []
    for name in ("ste", "taught"):
        model, _, run = stepped(name, steps=40)
        distances.append((latents(run, model)["0.weight"] - network()[0].weight.detach()).norm().item())
    assert distances[1] < 0.8 * distances[0]


def test_repr_tells_method_counts_path_and_memory():
    model, _, run = stepped("ste")
    elements = sum(model.get_parameter(name).numel() for name in QUANTIZED)
    text = repr(run)
    assert "Run(ste on int3 block 16" in text
    assert f"3 parameters, {elements:,} elements; step 3; eager path" in text
    assert f"{4 * elements / 1e6:.1f} MB of latent weights" in text
    assert "penalty in the first moment" in repr(stepped("lotion")[2])
    run.detach()
    assert "detached" in repr(run)
