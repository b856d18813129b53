"""The comparison is fair: same start, same batches, same steps; scores say what they claim."""

import warnings
from dataclasses import replace

import pytest
import torch

from stepwell.methods.base import Method
from stepwell.methods.lotion import lotion
from stepwell.presets import int2, int4, int8
from stepwell.recipes.digits import digits as recipe
from stepwell.rounding import stochastic
from stepwell.train.compare import FLOAT_BITS, FULL_PRECISION, Arm, Comparison, Network, compare, count_fits, scores, write_
from stepwell.train.data import load_digits
from stepwell.train.loop import evaluate
from stepwell.train.models import mlp


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def plain(quantizer, _):
    """A method that does nothing while training."""
    return Method(quantizer, "plain")


def tiny(**changes):
    arms = (Arm("RTN"), Arm("plain", plain))
    start = Comparison((64, 32, 10), 16, 20, 3e-3, 15, (1e-3, 2e-3), ((4, int4()), (2, int2())), arms, (0, 1), 2)
    return replace(start, **changes)


@pytest.fixture(scope="module")
def outcome(digits):
    words = []
    pairs = list(compare(tiny(), digits, words.append))
    return pairs, words


def test_a_method_that_does_nothing_ends_where_full_precision_ends(outcome):
    """Equal budget, bit for bit: same start, same batches, same schedule, same optimizer."""
    pairs, _ = outcome
    pairs = {(trial.arm, trial.bits, trial.lr, trial.seed): (trial, network) for trial, network in pairs}
    for lr in (1e-3, 2e-3):
        for seed in (0, 1):
            control = pairs[FULL_PRECISION, FLOAT_BITS, lr, seed][1].model
            for bits in (4, 2):
                (rtn, rounded), (mine, trained) = (pairs[arm, bits, lr, seed] for arm in ("RTN", "plain"))
                for name, latent in trained.latent.items():
                    assert torch.equal(latent, control.get_parameter(name))
                    assert torch.equal(latent, rounded.latent[name])
                assert mine[4:] == rtn[4:]  # all four scores


def test_every_training_run_is_counted(outcome):
    pairs, words = outcome
    assert len(words) == count_fits(tiny()) == 2 * (1 + 2 * (1 + 2))
    assert len(pairs) == 2 * 2 * (1 + 2 * 2)  # seeds, rates, full precision and two arms at two widths
    assert count_fits(recipe()) == 5 * (1 + 2 * (1 + 3 * 4))


def test_seeds_and_rates_make_a_difference(outcome):
    pairs, _ = outcome
    losses = {(trial.lr, trial.seed): trial.nearest.loss for trial, _ in pairs if trial.arm == FULL_PRECISION}
    assert len(set(losses.values())) == 4


def test_scores_are_those_of_the_roundings_they_name(digits):
    quantizer = int2()
    model = mlp((64, 32, 10), seed=0)
    latent = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith("weight")}
    encoded = {name: quantizer.encode(weight) for name, weight in latent.items()}
    write_(model, {name: one.decode() for name, one in encoded.items()})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    validation, nearest, randomized, floating = scores(Network(model, latent, encoded), quantizer, digits, draws=3)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())

    def rounded(rounding):
        twin = mlp((64, 32, 10), seed=0)
        write_(twin, {name: rounding(weight) for name, weight in latent.items()})
        return evaluate(twin, digits.test)

    assert nearest == rounded(quantizer)
    assert floating == rounded(lambda weight: weight)
    assert validation != nearest
    drawn = []
    for draw in range(3):
        generator = torch.Generator().manual_seed(draw)
        drawn.append(rounded(lambda weight, g=generator: quantizer(weight, rounding=stochastic(g))).loss)
    assert randomized.loss == pytest.approx(sum(drawn) / 3, rel=1e-12)
    assert len(set(drawn)) == 3


def test_an_arm_may_bring_its_own_scale_rule(digits):
    """A searched scale has a smaller squared error on the weights than absmax, by its definition."""
    config = tiny(arms=(Arm("absmax"), Arm("searched", rule="mse")), lrs=(1e-3,), seeds=(0,), grids=((2, int2()),))
    errors = {}
    for trial, network in compare(config, digits, lambda _: None):
        errors[trial.arm] = sum((one.decode() - network.latent[name]).square().sum() for name, one in network.encoded.items())
    assert errors["searched"] < errors["absmax"]


def test_trained_weights_are_on_the_grid_and_latents_are_not(digits):
    config = tiny(arms=recipe().arms[2:], lrs=(1e-3,), seeds=(0,), grids=((8, int8()),))
    for trial, network in compare(config, digits, lambda _: None):
        for name, encoded in network.encoded.items():
            weight = network.model.get_parameter(name)
            assert torch.equal(weight, encoded.decode()), trial.arm
            assert not torch.equal(weight, network.latent[name])


@pytest.mark.filterwarnings("error")
def test_what_a_run_says_of_its_penalty_is_in_the_record_and_not_on_the_screen(digits):
    """Forty times theory's unit is beyond the bound of 2 at 2 bits; a thousandth of it is not. Other warnings come through."""
    arms = tuple(Arm(str(strength), lambda q, terms, s=strength: lotion(q, strength=s, loss_terms=terms)) for strength in (1e-3, 40.0))
    found = [trial for trial, _ in compare(tiny(arms=arms, seeds=(0,), lrs=(1e-3,), grids=((2, int2()),)), digits, lambda _: None)]
    assert [(trial.arm, trial.beyond_bound) for trial in found[1:]] == [("0.001", False), ("40.0", True)]

    def loud(quantizer, _):
        return Method(quantizer, "loud", deploy=lambda weight, _: warnings.warn("look here", stacklevel=1) or weight)

    with pytest.warns(UserWarning, match="look here"):
        list(compare(tiny(arms=(Arm("loud", loud),), seeds=(0,), lrs=(1e-3,), grids=((2, int2()),)), digits, lambda _: None))
