"""Means, standard errors, the choice of learning rate, paired gains: on numbers small enough to do by hand."""

import math

import pytest
from scipy import stats

from stepwell.train.compare import FLOAT_BITS, FULL_PRECISION, Trial
from stepwell.train.loop import Score
from stepwell.train.summary import Estimate, best, chosen, estimate, summarize


def trial(arm, lr, seed, *, validation, test, bits=2):
    score = Score(test, 1 - test / 10)
    return Trial(arm, bits, lr, seed, Score(validation, 0.5), score, Score(2 * test, 0.1), Score(test / 2, 0.9))


TRIALS = [
    trial("RTN", 0.1, 0, validation=2.0, test=1.0),
    trial("RTN", 0.1, 1, validation=2.0, test=2.0),
    trial("STE", 0.1, 0, validation=1.0, test=0.6),
    trial("STE", 0.1, 1, validation=1.2, test=1.8),
    trial("STE", 0.2, 0, validation=0.1, test=0.1),  # best on one seed and on the test images, worse on average where it counts
    trial("STE", 0.2, 1, validation=9.0, test=0.1),
    trial("LOTION", 0.1, 1, validation=0.5, test=1.0),  # seeds may come in any order
    trial("LOTION", 0.1, 0, validation=0.5, test=0.9),
]


def test_estimate_agrees_with_scipy():
    values = [0.3, 1.7, 2.2, 0.1]
    assert estimate(values) == pytest.approx((sum(values) / 4, stats.sem(values)), rel=1e-12)
    assert Estimate(3.0, 0.5).sigmas == 6.0
    assert Estimate(-3.0, 0.0).sigmas == -math.inf
    assert Estimate(0.0, 0.0).sigmas == 0.0


def test_the_learning_rate_is_chosen_on_validation_images_over_all_seeds():
    assert {t.lr for t in chosen(TRIALS, "STE", 2)} == {0.1}
    assert [t.seed for t in chosen(TRIALS, "LOTION", 2)] == [0, 1]


def test_a_diverged_run_is_never_chosen():
    broken = [trial("STE", 0.3, seed, validation=math.nan if seed else 0.0, test=0.0) for seed in (0, 1)]
    assert {t.lr for t in chosen([*broken, *TRIALS], "STE", 2)} == {0.1}


def test_gains_are_paired_by_seed():
    rows = {row.arm: row for row in summarize(TRIALS, against="RTN")}
    # RTN 1.0, 2.0 against STE 0.6, 1.8: differences 0.4, 0.2; their deviation is 0.1414, over the root of two: 0.1
    assert rows["STE"].gain == pytest.approx((0.3, 0.1))
    assert rows["STE"].gain.sigmas == pytest.approx(3.0)
    # LOTION 0.9 (seed 0), 1.0 (seed 1): differences 0.1, 1.0
    assert rows["LOTION"].gain == pytest.approx((0.55, 0.45))
    assert rows["RTN"].gain == (0.0, 0.0)
    assert rows["STE"].randomized_gain == pytest.approx((0.6, 0.2))
    assert rows["STE"].loss.mean == pytest.approx(1.2)
    assert rows["STE"].latent_loss.mean == pytest.approx(0.6)
    assert rows["STE"].accuracy.mean == pytest.approx(0.88)


def test_full_precision_is_compared_with_nobody():
    full = [trial(FULL_PRECISION, 0.1, seed, validation=0.1, test=0.1, bits=FLOAT_BITS) for seed in (0, 1)]
    row = summarize([*full, *TRIALS], against="RTN")[0]
    assert (row.arm, row.gain) == (FULL_PRECISION, (0.0, 0.0))


def test_best_looks_at_validation_and_only_at_the_methods_named():
    rows = summarize(TRIALS, against="RTN")
    assert best(rows, 2, ("RTN", "STE", "LOTION")).arm == "LOTION"
    assert best(rows, 2, ("RTN", "STE")).arm == "STE"


def test_too_few_seeds_and_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="`values` must hold at least two numbers: got 1"):
        estimate([1.0])
    with pytest.raises(ValueError, match=r"`trials` hold nothing for arm='PARQ' at bits=2"):
        chosen(TRIALS, "PARQ", 2)
