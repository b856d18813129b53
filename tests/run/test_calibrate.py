"""The number of loss terms, measured: a model that is right about its data has the Fisher information as curvature, and N is the batch."""

import copy
import warnings

import pytest
import torch
from tests.cases import METHODS, gaussian, seeded
from tests.run.training import batches, network, same, train, weights
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import stepwell as sw

SIZE = 48


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def truthful(seed=0):
    """Return a classifier and batches of inputs `(48, 32)` with labels that it has drawn itself."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6))
    model[2].weight.data.mul_(4)
    generator, data = seeded(seed), []
    for k in range(60):
        inputs = gaussian(SIZE, 32, seed=100 * seed + k)
        with torch.no_grad():
            odds = model(inputs).softmax(-1)
        data.append((inputs, torch.multinomial(odds, 1, generator=generator)[:, 0]))
    return model, data


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("name", ["lotion", "ste + lotion", "prox", "coupled", "own curvature", "default"])
def test_measured_terms_are_the_batch(name, bits):
    """Two thousand labels estimate a sum of a thousand squares to some per cent; 3 bits move the weights beyond the second order."""
    model, data = truthful()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = sw.attach(model, METHODS[name](sw.intn(bits, block=8)), optimizer)
    shown = weights(model)
    found = run.calibrate(loss, data)
    assert 0.8 < found.loss_terms / SIZE < 1.25
    assert run.loss_terms == found.loss_terms == pytest.approx(found.increase / found.penalty)
    assert 0 < found.stderr < 0.1 * found.increase
    assert same(weights(model), shown)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not optimizer.state


def test_optimizers_own_moment_is_used_where_there_is_one():
    """A second moment that was multiplied by hundred makes the loss terms a hundredth."""
    model, data = truthful()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98))
    run = sw.attach(model, sw.lotion(sw.int4(block=8), loss_terms=1), optimizer)
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    plain = run.calibrate(loss, data).loss_terms
    assert 0.7 < plain / SIZE < 1.4
    for parameter in model.parameters():
        optimizer.state[parameter]["exp_avg_sq"].mul_(100)
    assert run.calibrate(loss, data).loss_terms == pytest.approx(plain / 100, rel=1e-4)


def test_a_loss_that_is_a_sum_has_a_larger_curvature_and_no_other_terms():
    """Scaling the loss scales its curvature once and its squared gradient twice."""
    found = []
    for factor in (1.0, 10.0):
        model, data = truthful()
        run = sw.attach(model, sw.lotion(sw.int4(block=8)), torch.optim.AdamW(model.parameters()))
        found.append(run.calibrate(lambda model, batch, factor=factor: factor * loss(model, batch), data).loss_terms)
    assert found[1] == pytest.approx(found[0] / 10, rel=1e-3)


@pytest.mark.parametrize("fresh", [True, False], ids=["a new run", "the run itself"])
def test_calibrated_count_goes_with_the_state(fresh):
    """Resumed from `optimizer.state_dict()` alone, a run goes on with the count that was measured, to the last bit."""
    model, data = truthful()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = sw.attach(model, sw.lotion(sw.int4(block=8)), optimizer)
    count = run.calibrate(loss, data[:10]).loss_terms
    train(model, optimizer, data[:3], loss=cross_entropy)
    held, state = weights(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data[3:6], loss=cross_entropy)
    expected = weights(model)
    if fresh:
        run.detach()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = sw.attach(model, sw.lotion(sw.int4(block=8)), optimizer)
        assert run.loss_terms is None
    else:
        assert run.calibrate(loss, data[20:24]).loss_terms != count
    model.load_state_dict(held, strict=False)
    optimizer.load_state_dict(state)
    assert run.loss_terms == count
    train(model, optimizer, data[3:6], loss=cross_entropy)
    assert same(weights(model), expected)


def test_count_that_somebody_told_the_run_stays_his():
    model, data = truthful()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = sw.attach(model, sw.lotion(sw.int4(block=8)), optimizer)
    run.calibrate(loss, data[:10])
    train(model, optimizer, data[:2], loss=cross_entropy)
    measured = optimizer.state_dict()
    run.loss_terms = 77.0
    optimizer.load_state_dict(measured)
    assert run.loss_terms == 77.0
    run.loss_terms = None
    optimizer.load_state_dict(measured)
    assert run.loss_terms != 77.0
    run.loss_terms = 77.0
    told = optimizer.state_dict()
    run.loss_terms = None
    optimizer.load_state_dict(told)
    assert run.loss_terms is None  # what a program sets, it will set again


def test_calibration_on_schedule():
    model, data = truthful()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = sw.attach(model, sw.lotion(sw.int4(block=8)), optimizer)
    with pytest.raises(RuntimeError, match=r"`loss_terms` is not set.*`run.calibrate\(loss, batches\)`"):
        train(model, optimizer, data[:1], loss=cross_entropy)
    run.calibrate(loss, data[:10], every=3)
    seen = []
    for k in range(7):
        train(model, optimizer, data[k : k + 1], loss=cross_entropy)
        seen.append(run.loss_terms)
    assert seen[0] == seen[1]
    assert len({seen[1], seen[2], seen[5]}) == 3
    assert seen[2:5] == [seen[2]] * 3
    run.finalize()


def test_dropout_and_batch_statistics_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 6))
    model[1].eval()
    run = sw.attach(model, sw.lotion(sw.int3(block=8)), torch.optim.AdamW(model.parameters()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run.calibrate(loss, truthful()[1])
    assert same(before, dict(model.state_dict()))
    assert [module.training for module in model] == [True, False, True, True]


def test_what_cannot_be_measured_is_said_and_changes_nothing():
    model, data = truthful()
    run = sw.attach(model, sw.ste(sw.int3(block=8)), torch.optim.AdamW(model.parameters()))
    with pytest.raises(RuntimeError, match="no method of this run counts loss terms"):
        run.calibrate(loss, data)
    run.detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = sw.attach(model, sw.lotion(sw.int3(block=8)), optimizer)
    run.loss_terms = 7.0
    before = weights(model)
    with pytest.raises(RuntimeError, match="`loss` does not rise measurably under randomized rounding"):
        run.calibrate(lambda model, batch: -loss(model, batch), data[:4])
    for arguments, error, message in (
        (([],), ValueError, "`batches` must hold data"),
        ((data[0][0],), TypeError, "`batches` must be an iterable"),
    ):
        with pytest.raises(error, match=message):
            run.calibrate(loss, *arguments)
    with pytest.raises(ValueError, match="`draws`"):
        run.calibrate(loss, data, draws=1)
    with pytest.raises(ValueError, match="`every`"):
        run.calibrate(loss, data, every=0)
    with run.deployed(), pytest.raises(RuntimeError, match=r"inside `run.deployed\(\)`"):
        run.calibrate(loss, data)
    assert same(weights(model), before)
    assert run.loss_terms == 7.0


def test_calibration_that_fails_on_schedule_warns_and_keeps_the_count():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, sw.lotion(sw.int3(block=16)), optimizer)
    sign = 1

    def turning(model, batch):
        return sign * mse_loss(model(batch[0]), batch[1])

    kept = run.calibrate(turning, batches(8), every=2).loss_terms
    sign = -1
    with pytest.warns(UserWarning, match="calibration at step 2: .*The count of before stays"):
        train(model, optimizer, batches(2))
    assert run.loss_terms == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, batches(1))
