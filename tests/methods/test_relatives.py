"""Forward maps and proximal steps of LOTION's relatives against the papers' formulas, one weight at a time."""

import math

import pytest
import torch
from tests.cases import GRIDS, METHODS, gaussian
from tests.reference import relatives
from tests.run.training import batches, latents, network, ones, train, weights

import stepwell as sw
from stepwell.methods.base import Context
from stepwell.methods.binary_relax import relaxed
from stepwell.methods.fisher import FISHER
from stepwell.methods.parq import affine, annealed
from stepwell.methods.sampled import drawn
from stepwell.methods.soft import smoothed

PLAIN = [quantizer for quantizer in GRIDS if quantizer.compute is None]
ROWS = gaussian(6, 32, seed=0, dtype=torch.float64)


def context(quantizer, **values):
    """Return what a method is told about `ROWS` at the scales of the quantizer's rule, with 0-dim scheduled values."""
    zero = torch.zeros((), dtype=torch.float64)
    fit = quantizer.local().fit(ROWS)
    scheduled = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    return Context(quantizer.local(), 0, zero, zero + 1, fit, {}, torch.tensor(5), 0, scheduled)


def slowly(quantizer, function):
    """Return a function of (weight, sorted grid values) at every element of `ROWS`."""
    scales = quantizer.local().fit(ROWS).scale.expand(6, 1)
    found = [
        [function(w, relatives.levels(quantizer, float(s))) for w in row]
        for row, s in zip(ROWS.tolist(), scales.flatten().tolist(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("rho", [1.0, 0.6, 0.1, 1e-3, 0.0])
@pytest.mark.parametrize("quantizer", PLAIN, ids=str)
def test_parq_is_the_papers_map(quantizer, rho):
    found = annealed(ROWS, context(quantizer, slope=rho))
    # an error of 1e-15 of the largest weight is divided by the slope
    torch.testing.assert_close(found, slowly(quantizer, lambda w, grid: relatives.parq(w, grid, rho)), rtol=0, atol=1e-14 / max(rho, 1e-2))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("quantizer", PLAIN, ids=str)
def test_binary_relax_is_a_weighted_mean(quantizer, share):
    found, part = relaxed(ROWS, context(quantizer, share=share)), min(share, 1.0)
    expected = slowly(quantizer, lambda w, grid: (1 - part) * w + part * relatives.parq(w, grid, 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("quantizer", [quantizer for quantizer in PLAIN if len(quantizer.format.values) < 20], ids=str)
def test_soft_staircase_is_the_sum_over_all_thresholds(quantizer, temperature):
    scales = quantizer.local().fit(ROWS).scale.expand(6, 1).flatten().tolist()
    found = smoothed(ROWS, context(quantizer, temperature=temperature))
    units = [
        [relatives.soft(w / s, relatives.levels(quantizer, 1.0), temperature) * s for w in row]
        for row, s in zip(ROWS.tolist(), scales, strict=True)
    ]
    # left-out thresholds are 6 standard deviations away: 1e-9 each of a step of at most 3
    torch.testing.assert_close(found, torch.tensor(units, dtype=torch.float64), rtol=0, atol=6e-9)


def test_soft_staircase_at_zero_is_rounding_also_on_ties():
    rows = torch.tensor([[1.0, 0.5, -0.5, 0.0]], dtype=torch.float64)
    quantizer = sw.int2(block=4)
    found = smoothed(
        rows, Context(quantizer.local(), 0, rows[0, 0], rows[0, 0], None, {}, torch.tensor(0), 0, {"temperature": torch.tensor(0.0)})
    )
    assert torch.equal(found, quantizer(rows))


@pytest.mark.parametrize("strength", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("quantizer", PLAIN, ids=str)
def test_proximal_step_is_the_minimum_by_brute_force(quantizer, strength):
    """Also through PARQ's map: slope 1 - c is LOTION's proximal step."""
    curvature, eta = gaussian(6, 32, seed=3, dtype=torch.float64).square(), 0.2
    fit = quantizer.local().fit(ROWS)
    found = affine(ROWS, quantizer.local(), fit, 1 - strength * eta * curvature)
    for row in range(6):
        grid = relatives.levels(quantizer, float(fit.scale.expand(6, 1)[row]))
        for column in range(32):
            c = strength * eta * float(curvature[row, column])
            if abs(c - 1) < 1e-3:
                continue  # nearly flat: the minimum is not determined to 1e-8
            expected = relatives.prox(float(ROWS[row, column]), float(curvature[row, column]), grid, strength, eta)
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("forward", ["latent", "nearest"])
def test_training_with_prox_is_adamw_and_a_brute_force_step(forward):
    """With gradients that do not depend on the weights, so that the optimizer's own step can be had from a plain run."""
    quantizer, lr, strength, terms = sw.int3(block=8), 0.05, 2.0, 50.0
    layers = [torch.nn.Linear(16, 2, bias=False, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=lr, betas=(0.9, 0.95)) for layer in layers]
    run = sw.attach(layers[0], sw.prox(quantizer, strength=strength, loss_terms=terms, forward=forward), optimizers[0])
    for step in range(4):
        for layer in layers:
            layer.weight.grad = gaussian(2, 16, seed=step, dtype=torch.float64) * 0.05
        for optimizer in optimizers:
            optimizer.step()
        plain = layers[1].weight.data
        hat = optimizers[1].state[layers[1].weight]["exp_avg_sq"] / (1 - 0.95 ** (step + 1))
        scale = quantizer.scale(plain).flatten()
        moved = plain.clone()
        for k in range(plain.numel()):
            w, v = plain.flatten()[k].item(), hat.flatten()[k].item()
            grid = relatives.levels(quantizer, scale[k // 8].item())
            moved.view(-1)[k] = relatives.prox(w, v, grid, strength * terms, lr / (math.sqrt(v) + 1e-8))
        plain.copy_(moved)
        torch.testing.assert_close(latents(run, layers[0])["weight"], moved, rtol=0, atol=1e-8)
        assert torch.equal(layers[0].weight, quantizer(latents(run, layers[0])["weight"])) == (forward == "nearest")


def test_prox_ends_on_the_grid():
    """Float, rounded and randomly rounded weights are then the same."""
    for name in ("prox", "ste + prox", "own curvature, prox"):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = sw.attach(model, METHODS[name](sw.int3(block=16)), optimizer)
        train(model, optimizer, batches(6))
        with run.latent():
            held = model[0].weight.detach().clone()
            drawn = sw.int3(block=16)(held, rounding=sw.stochastic(torch.Generator().manual_seed(0)))
        run.finalize()
        torch.testing.assert_close(held, model[0].weight.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(drawn, model[0].weight.detach(), rtol=1e-6, atol=0)


def test_cage_is_sgd_and_a_pull():
    quantizer, lr, pull = sw.int3(block=8), 0.1, 2.0
    layer = torch.nn.Linear(16, 4, bias=False, dtype=torch.float64)
    held = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    run = sw.attach(layer, sw.cage(quantizer, pull=sw.schedules.linear(0, pull, steps=2)), optimizer)
    for step in range(4):
        layer.weight.grad = gradient = gaussian(4, 16, seed=step, dtype=torch.float64)
        gradient = gradient.clone()
        optimizer.step()
        moved = held - lr * gradient
        held = moved - lr * pull * min(step + 1, 2) / 2 * (moved - quantizer(moved))
        torch.testing.assert_close(latents(run, layer)["weight"], held, rtol=0, atol=1e-14)
        torch.testing.assert_close(layer.weight.detach(), quantizer(held), rtol=0, atol=1e-14)


def test_sampled_rounding_has_the_weight_as_mean():
    """4000 draws; z is standard normal over 300 free weights: the mean of its square is 1 within five of sqrt(2 / 300)."""
    quantizer, draws = sw.int3(block=32), 4000
    bracket, total = quantizer.bracket(ROWS), torch.zeros_like(ROWS)
    told = context(quantizer)
    for step in range(draws):
        total += drawn(ROWS, told._replace(key=torch.tensor(step * 7919)))
    spread = sw.variance(bracket)
    free = spread > 1e-9
    z = ((total / draws - ROWS) / (spread / draws).sqrt())[free]
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / free.sum())
    assert torch.allclose((total / draws)[~free], ROWS[~free])


def test_own_curvature_is_the_mean_square_gradient():
    """A plain mean while it is younger than 1 / (1 - decay) steps, exponential from then on."""
    layer = torch.nn.Linear(16, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    run = sw.attach(layer, sw.fisher(sw.lotion(sw.int3(block=8), loss_terms=8), decay=0.75), optimizer)
    expected = torch.zeros(4, 16)
    for step in range(9):
        gradient = gaussian(4, 16, seed=step)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        share = max(1 / (step + 1), 0.25)
        expected = (1 - share) * expected + share * gradient.square()
    found = optimizer.state_dict()["state"][0]["method_tensor_" + FISHER]
    torch.testing.assert_close(found.reshape(4, 16), expected, rtol=1e-5, atol=1e-7)
    assert run.steps == 9


def test_own_curvature_acts_as_given_curvature_does():
    """With the same gradient in every step the average is its square from the first step on."""
    results = []
    for given in (False, True):
        layer = torch.nn.Linear(16, 4, bias=False)
        layer.weight.data = gaussian(4, 16, seed=1)
        gradient = gaussian(4, 16, seed=2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        quantizer = sw.int3(block=8)
        method = (
            sw.lotion(quantizer, strength=8, curvature={"weight": gradient.square()})
            if given
            else sw.fisher(sw.lotion(quantizer, loss_terms=8))
        )
        sw.attach(layer, method, optimizer)
        for _ in range(5):
            layer.weight.grad = gradient.clone()
            optimizer.step()
        results.append(layer.weight.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(results[0], gaussian(4, 16, seed=1) - 5 * 0.01 * gaussian(4, 16, seed=2), atol=1e-4)


def test_coupled_penalty_is_in_the_gradient_from_the_second_step_on():
    quantizer, lr = sw.int3(block=8), 0.01
    layer = torch.nn.Linear(16, 4, bias=False, dtype=torch.float64)
    held, mean = layer.weight.detach().clone(), torch.zeros(4, 16, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    sw.attach(layer, sw.coupled(quantizer, strength=0.5, loss_terms=8), optimizer)
    for step in range(5):
        gradient = gaussian(4, 16, seed=step, dtype=torch.float64)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        force = 0.5 * 8 * sw.methods.lotion.penalty_gradient(held, mean, quantizer, through_scale=False)
        held = held - lr * (gradient + force)
        mean = mean + (gradient.square() - mean) / (step + 1)
        torch.testing.assert_close(layer.weight.detach(), held, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: sw.parq(q, slope=-1), "`slope`"),
        (lambda q: sw.parq(q, slope=math.nan), "`slope`"),
        (lambda q: sw.parq(q, slope=lambda step: -1.0), "`slope`.*at step 0"),
        (lambda q: sw.binary_relax(q, share=math.inf), "`share`"),
        (lambda q: sw.cage(q, pull=-0.1), "`pull`"),
        (lambda q: sw.soft(q, temperature=-0.1), "`temperature`"),
        (lambda q: sw.soft(sw.fp8(), temperature=0.1), "`quantizer` must have equal steps"),
        (lambda q: sw.prox(q, strength=-1.0), "`strength`"),
        (lambda q: sw.prox(q, strength=1.0, forward="round"), "`forward`"),
        (lambda q: sw.prox(q, strength=1.0, loss_terms=-1), "`loss_terms`"),
        (lambda q: sw.coupled(q, strength=math.inf), "`strength`"),
        (lambda q: sw.coupled(q, decay=1.0), "`decay`"),
        (lambda q: sw.fisher(sw.ste(q)), "`method`: ste reads no curvature"),
        (lambda q: sw.fisher(sw.lotion(q, curvature={})), "`method`: lotion reads no curvature"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(sw.int4())


@pytest.mark.parametrize(
    "make",
    [
        lambda: sw.parq(4, slope=1),
        lambda: sw.parq(sw.int4(), slope="fast"),
        lambda: sw.fisher(sw.int4()),
        lambda: sw.prox(sw.int4(), strength=1, curvature=3),
        lambda: sw.sampled(None),
    ],
)
def test_wrong_kinds_are_named(make):
    with pytest.raises(TypeError, match=r"`(quantizer|slope|method|curvature)` must be"):
        make()


def test_schedule_that_goes_wrong_later_names_the_step_and_changes_nothing():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, sw.parq(sw.int3(block=16), slope=lambda step: 1 - step / 2), optimizer)
    train(model, optimizer, batches(1))
    held = latents(run, model)
    with pytest.raises(ValueError, match=r"`slope` must be finite and 0 or more at every step: .*gave -0.5 at step 3"):
        train(model, optimizer, batches(4)[1:])
    assert run.steps == 3 or not torch.equal(held["0.weight"], weights(model)["0.weight"])


def test_second_moment_that_is_missing_names_the_remedy():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"SGD does not keep.*`fisher\(method\)`"):
        sw.attach(model, sw.prox(sw.int3(block=16), strength=1, loss_terms=64), optimizer)
    run = sw.attach(model, sw.fisher(sw.prox(sw.int3(block=16), strength=1, loss_terms=64)), optimizer)
    train(model, optimizer, batches(2))
    run.finalize()
    sw.attach(model, sw.prox(sw.int3(block=16), strength=1, curvature=ones(model)), optimizer)
