"""The six rules of the optimizer step, one group of tests each; every test fails without its rule."""

import warnings

import pytest
import torch
from tests.run.training import OPTIMIZERS, batches, latents, network, same, train, weights
from torch.nn.functional import mse_loss

import stepwell as sw

Q = sw.int3(block=16)
METHODS = {
    "ste": lambda: sw.ste(Q),
    "lotion": lambda: sw.lotion(Q, loss_terms=64),
    "ste + lotion": lambda: sw.lotion(Q, loss_terms=64, forward="nearest"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def attached(method="ste", optimizer="adamw for-loop", **options):
    """Return a fresh model, its optimizer and its run."""
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    return model, made, sw.attach(model, METHODS[method](), made, **options)


def outcome(model, optimizer, run):
    """Return what two runs that should be equal are compared by: what the model holds, the latent weights, the moments and the count."""
    moments = {
        f"{k}.{key}": value.clone()
        for k, parameter in enumerate(model.parameters())
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }
    return {**weights(model), **{f"latent {n}": v for n, v in latents(run, model).items()}, **moments, "steps": torch.tensor(run.steps)}


# 1. The Run owns the latent weights.


@every_method
def test_optimizer_state_holds_nothing_of_ours_but_its_dictionary_does(method):
    model, optimizer, _run = attached(method)
    before = optimizer.state_dict()["state"]
    assert not optimizer.state  # an entry here and Adam would never create its moments
    train(model, optimizer, batches(2))
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in optimizer.state.values())
    ours = {"method_step"} | ({"latent"} if method != "lotion" else set()) | ({"method_loss_terms"} if method != "ste" else set())
    assert set(before[0]) == ours
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"} | ours
    assert set(optimizer.state_dict()["state"][1]) == {"step", "exp_avg", "exp_avg_sq"}  # a bias


def test_state_may_go_through_the_optimizer_before_training():
    """Accelerate does this; entries of ours in `optimizer.state` would end in a KeyError at the first step."""
    results = []
    for round_trip in (False, True):
        model, optimizer, run = attached()
        if round_trip:
            optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, batches(3))
        results.append(outcome(model, optimizer, run))
    assert same(*results)


# 2. Outermost call only.


class Nested(torch.optim.AdamW):
    """Calls its parent's step, so that every hook fires twice."""

    def step(self, closure=None):
        return super().step(closure)


@every_method
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.filterwarnings("error")  # an inner hook would take our own latent weights for an outside write
def test_subclass_that_calls_its_parent_steps_once(method, closure):
    results = []
    for kind in (torch.optim.AdamW, Nested):
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # from its first instance on, AdamW.step itself fires hooks
        model = network()
        optimizer = kind(model.parameters(), lr=0.01)
        run = sw.attach(model, METHODS[method](), optimizer)
        for inputs, targets in batches(4):
            optimizer.zero_grad()
            if closure:
                optimizer.step(closure_of(model, optimizer, inputs, targets))
            else:
                mse_loss(model(inputs), targets).backward()
                optimizer.step()
        results.append(outcome(model, optimizer, run))
    assert results[0]["steps"] == 4
    assert same(*results)


def test_hooks_really_fire_twice_for_that_subclass():
    fired = []
    model = network()
    torch.optim.AdamW(model.parameters())
    optimizer = Nested(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.step()
    assert fired == ["before", "before"]


# 3. Closures see deployed weights.


def closure_of(model, optimizer, inputs, targets, seen=None):
    def closure():
        optimizer.zero_grad()
        if seen is not None:
            seen.append(weights(model))
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    return closure


@every_method
@pytest.mark.parametrize("optimizer", ["adamw for-loop", "adamw foreach", "adamw fused", "stepwell adamw", "adam for-loop", "radam"])
def test_step_with_a_closure_equals_step_after_backward(method, optimizer):
    results, losses = [], []
    for closure in (False, True):
        model, made, run = attached(method, optimizer)
        if closure:
            losses.append([made.step(closure_of(model, made, *pair)).item() for pair in batches(4)])
        else:
            losses.append(train(model, made, batches(4)))
        results.append(outcome(model, made, run))
    assert losses[0] == losses[1]
    assert same(*results)


def test_closure_may_be_a_keyword_and_sees_what_the_forward_pass_sees():
    model, optimizer, _run = attached()
    for pair in batches(3):
        shown, seen = weights(model), []
        optimizer.step(closure=closure_of(model, optimizer, *pair, seen))
        assert same(shown, seen[0])


def test_optimizer_may_call_the_closure_many_times():
    """LBFGS evaluates trial points: each is deployed before the forward pass, and the last one is the latent weight."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=6, line_search_fn="strong_wolfe")
    run = sw.attach(model, sw.ste(Q), optimizer)
    seen: list = []
    (pair,) = batches(1)
    first = optimizer.step(closure_of(model, optimizer, *pair, seen)).item()
    assert len(seen) > 3
    for trial in seen:
        # int3 absmax grids are idempotent: what is on the grid stays
        assert all(torch.equal(Q(trial[name]), trial[name]) for name in ("0.weight", "2.weight", "4.weight"))
    assert not same(seen[0], seen[-1])
    held = latents(run, model)
    assert not torch.equal(held["0.weight"], weights(model)["0.weight"])
    assert torch.equal(Q(held["0.weight"]), weights(model)["0.weight"])
    assert mse_loss(model(pair[0]), pair[1]).item() < first
    assert run.steps == 1


@every_method
def test_exception_in_a_closure_changes_nothing(method):
    model, optimizer, run = attached(method)
    train(model, optimizer, batches(2))
    before = outcome(model, optimizer, run)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    assert same(outcome(model, optimizer, run), before)


# 4. External writes are adopted by value.


@every_method
def test_load_state_dict_after_attach_becomes_the_latent_weight(method):
    model, optimizer, run = attached(method)
    train(model, optimizer, batches(2))
    other = weights(network(seed=5))
    model.load_state_dict(other)
    if method == "lotion":  # it holds no latent weights: what is written is what trains
        train(model, optimizer, batches(1))
        return
    with pytest.warns(UserWarning, match="0.weight.*written to from outside") as caught:
        held = latents(run, model)
    assert len(caught) == 1
    assert same(held, other)
    assert torch.equal(model[0].weight, Q(other["0.weight"]))
    model.load_state_dict(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning per run
        train(model, optimizer, batches(1))


def test_step_after_an_outside_write_starts_from_the_written_values():
    """SGD: the latent weight after the step is the written value minus rate times the gradient at its rounded place."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.attach(model, sw.ste(Q), optimizer)
    written = weights(network(seed=5))
    model.load_state_dict(written)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match="written to from outside"):
        optimizer.step()
    assert torch.equal(latents(run, model)["0.weight"], written["0.weight"] - 0.1)


def test_writing_the_same_values_is_no_write():
    model, optimizer, run = attached()
    train(model, optimizer, batches(2))
    before = outcome(model, optimizer, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
        with torch.no_grad():
            model[0].weight.add_(0)
        train(model, optimizer, batches(1))
    assert not same(before, outcome(model, optimizer, run))
    clean, clean_optimizer, clean_run = attached()
    train(clean, clean_optimizer, [*batches(2), *batches(1)])
    assert same(outcome(clean, clean_optimizer, clean_run), outcome(model, optimizer, run))


def look_deployed(run, model, optimizer):
    with run.deployed():
        return model[0].weight.clone()


def look_detach(run, model, optimizer):
    run.detach(keep="deployed")
    return model[0].weight


def look_health(run, model, optimizer):
    run.health()
    return model[0].weight


LOOKS = {
    "finalize": lambda run, model, optimizer: run.finalize()["0.weight"].decode(),
    "deployed": look_deployed,
    "state_dict": lambda run, model, optimizer: Q(optimizer.state_dict()["state"][0]["latent"]),
    "health": look_health,
    "detach": look_detach,
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_public_call_sees_outside_writes(look):
    model, optimizer, run = attached()
    train(model, optimizer, batches(2))
    written = weights(network(seed=5))
    model.load_state_dict(written)
    with pytest.warns(UserWarning, match="written to from outside"):
        seen = LOOKS[look](run, model, optimizer)
    assert torch.equal(seen, Q(written["0.weight"]))


# 5. Phase repair.


class Failing(torch.optim.AdamW):
    """AdamW for single tensors that fails on demand after some parameters; `foreach=False` updates them in order."""

    after: int | None = None

    def step(self, closure=None):
        if self.after is None:
            return super().step(closure)
        held, group = self.param_groups[0]["params"], self.param_groups[0]
        group["params"] = held[: self.after]
        try:
            super().step(closure)
        finally:
            group["params"] = held
        raise OSError("device lost")


@every_method
@pytest.mark.parametrize("done", [0, 2])
def test_failed_step_is_repaired_by_the_next_call(method, done):
    model = network()
    optimizer = Failing(model.parameters(), lr=0.01, foreach=False)
    run = sw.attach(model, METHODS[method](), optimizer)
    train(model, optimizer, batches(3))
    before, moments = latents(run, model), moments_of(model, optimizer)
    optimizer.after = done
    mse_loss(model(batches(4)[3][0]), batches(4)[3][1]).backward()
    with pytest.raises(OSError, match="device lost"):
        optimizer.step()
    after = latents(run, model)  # repairs first
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("bias"):
            continue
        if index >= done or method != "lotion":  # without a latent copy, what the optimizer has already moved stays moved
            assert torch.equal(after[name], before[name])
        if index >= done:
            # adding the push and taking it away again leaves one rounding error of the larger term
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], moments[name], rtol=1e-6, atol=1e-8)
        elif method != "ste":
            assert not torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])
    assert run.steps == 3
    if method != "lotion":
        assert torch.equal(model[0].weight, Q(after["0.weight"]))


def moments_of(model, optimizer):
    return {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in model.named_parameters()}


def test_push_is_undone_only_where_the_optimizer_did_not_use_it():
    """The push of a large penalty is visible in the first moment, and gone after the repair."""
    model = network()
    optimizer = Failing(model.parameters(), lr=0.01, foreach=False)
    run = sw.attach(model, sw.lotion(Q, loss_terms=1e4), optimizer)
    train(model, optimizer, batches(2))
    before = moments_of(model, optimizer)["0.weight"]
    optimizer.after = 0
    mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    with pytest.raises(OSError, match="device lost"):
        optimizer.step()
    pushed = moments_of(model, optimizer)["0.weight"]
    run.health()
    repaired = moments_of(model, optimizer)["0.weight"]
    assert (pushed - before).abs().max() > 100 * (repaired - before).abs().max()


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize(
    ("method", "tensors", "closure"),
    [
        (sw.learned(sw.ste(Q)), 5, False),
        (sw.learned(sw.ste(Q)), 5, True),
        (sw.coupled(Q, loss_terms=8), 2, True),
        (sw.fisher(sw.lotion(Q, loss_terms=8)), 2, False),  # no closure: `Failing` hides parameters, which a push inside one asks for
    ],
    ids=["scales", "scales, closure", "coupled, closure", "fisher"],
)
def test_failed_step_takes_back_what_the_method_learned(method, tensors, closure, done):
    """Scales and what they learn with, averages of squared gradients; the next step then ends where one ends that never failed."""
    inputs, targets = batches(4)[3]
    ends = []
    for fails in (True, False):
        model = network()
        optimizer = Failing(model.parameters(), lr=0.01, foreach=False)
        run = sw.attach(model, method, optimizer)
        train(model, optimizer, batches(3))
        saved = optimizer.state_dict()["state"][0]
        before = {key: value.clone() for key, value in saved.items() if key.startswith("method_tensor")}
        assert len(before) == tensors

        def back(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        if fails:
            optimizer.after = done
            if not closure:
                back()
            with pytest.raises(OSError, match="device lost"):
                optimizer.step(back if closure else None)
            optimizer.after = None
            run.health()  # repairs
            after = optimizer.state_dict()["state"][0]
            assert all(torch.equal(after[key], value) for key, value in before.items())
        ends.append({key: value for key, value in optimizer.state_dict()["state"][0].items() if key.startswith("method_tensor")})
    assert same(*ends)


@every_method
def test_training_goes_on_after_a_failed_step(method):
    model = network()
    optimizer = Failing(model.parameters(), lr=0.01, foreach=False)
    run = sw.attach(model, METHODS[method](), optimizer)
    train(model, optimizer, batches(2))
    optimizer.after = 0
    with pytest.raises(OSError, match="device lost"):
        train(model, optimizer, batches(1))
    optimizer.after = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the repaired weights are ours, not an outside write
        run.health()  # any call repairs; without one the next step does, after a forward pass on latent weights
        train(model, optimizer, batches(3)[2:])
    clean, clean_optimizer, clean_run = attached(method)
    train(clean, clean_optimizer, [*batches(2), batches(3)[2]])
    assert run.steps == clean_run.steps == 3
    for name, value in latents(clean_run, clean).items():
        torch.testing.assert_close(latents(run, model)[name], value, rtol=0, atol=1e-6)  # an undone push leaves rounding error


def test_curvature_that_fails_at_one_parameter_leaves_none_half_way():
    """Our own hooks may raise too; here the third parameter's curvature does, after two have been opened."""

    def curvature(name):
        if name == "4.weight" and broken:
            raise OSError("no such file")
        return torch.ones_like(dict(model.named_parameters())[name])

    for kind in ("adamw for-loop", "sgd"):
        broken, model = False, network()
        optimizer = OPTIMIZERS[kind](model.parameters())
        run = sw.attach(model, sw.lotion(Q, curvature=curvature, forward="nearest"), optimizer)
        train(model, optimizer, batches(2))
        before, broken = latents(run, model), True
        with pytest.raises(OSError, match="no such file"):
            train(model, optimizer, batches(1))
        broken = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = latents(run, model)
        assert all(torch.equal(weights(model)[name], Q(after[name])) for name in ("0.weight", "2.weight", "4.weight"))
        assert torch.equal(after["4.weight"], before["4.weight"])
        assert torch.equal(
            after["0.weight"], before["0.weight"]
        )  # before the optimizer's step (Adam) or after it (SGD): no parameter moves


# 6. Skipped means skipped.


@every_method
@pytest.mark.parametrize("kind", ["adamw for-loop", "adamw fused", "stepwell adamw"])
def test_step_that_a_grad_scaler_skips_changes_nothing(method, kind):
    model, optimizer, run = attached(method, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k, (inputs, targets) in enumerate(batches(5)):
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(inputs), targets)).backward()
        if k == 3:
            model[0].weight.grad[0, 0] = torch.inf
            before = outcome(model, optimizer, run)
        scaler.step(optimizer)
        if k == 3:
            assert same(outcome(model, optimizer, run), before)
        scaler.update()
    assert run.steps == 4
    assert scaler.get_scale() == 2.0


def test_method_sees_unscaled_gradients_under_a_grad_scaler():
    """A fused optimizer unscales inside its step; a method that learns from the gradient must not learn from the scaled one."""
    sizes = []
    for factor in (1.0, 1024.0):
        seen: list = []

        def gradient(gradient, weight, deployed, context, seen=seen):
            seen.append(gradient.clone())
            return gradient

        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        sw.attach(model, sw.ste(Q)._replace(gradient=gradient), optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        for inputs, targets in batches(2):
            optimizer.zero_grad()
            scaler.scale(mse_loss(model(inputs), targets)).backward()
            scaler.step(optimizer)
            scaler.update()
        sizes.append((seen, weights(model)))
    assert all(torch.equal(*pair) for pair in zip(sizes[0][0], sizes[1][0], strict=True))  # powers of two scale exactly
    assert same(sizes[0][1], sizes[1][1])


@every_method
def test_parameter_without_a_gradient_is_left_alone(method):
    model, optimizer, run = attached(method)
    train(model, optimizer, batches(2))
    before, moment = weights(model), moments_of(model, optimizer)
    held = latents(run, model)
    mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(latents(run, model)["2.weight"], held["2.weight"])
    assert torch.equal(weights(model)["2.weight"], before["2.weight"])
    assert torch.equal(moments_of(model, optimizer)["2.weight"], moment["2.weight"])
    assert not torch.equal(latents(run, model)["0.weight"], held["0.weight"])
