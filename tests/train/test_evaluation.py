"""Evaluation: each loss is that of the weights it names, looking changes nothing, and the share of each process does not matter."""

import pytest
import torch
from tests.language import session_of, tiny, tokens_in
from torch.nn.functional import cross_entropy

from stepwell.train.checkpoint import flat
from stepwell.train.evaluation import encode, evaluate, holding
from stepwell.train.ranks import Ranks, here
from stepwell.train.session import advance


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokens_in(tmp_path_factory.mktemp("tokens"))


def after(tokens, name, steps=3):
    session = session_of(tiny(name), tokens)
    for step in range(steps):
        advance(session, step)
    return session


def measured(session, draws=0):
    return evaluate(session.model, session.run, session.recipe, session.tokens.held, session.ranks, draws=draws)


def by_hand(model, tokens):
    rows = tokens.held.rows(range(min(9, tokens.held.sequences(16))), 16)
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits
    return float(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["fp_1m", "int2_1m_lotion", "int2_1m"])
def test_each_loss_is_that_of_the_weights_it_names(tokens, name):
    session = after(tokens, name)
    before = {key: tensor.clone() for key, tensor in flat(session.model, session.optimizer).items()}
    losses = measured(session, draws=3)
    now = flat(session.model, session.optimizer)
    assert all(torch.equal(before[key], now[key]) for key in before), "looking changed something"
    assert session.model.training
    encoded = encode(session.model, session.run, session.recipe)
    assert len(encoded) == 14  # seven Linear layers in each of two blocks; the tied head stays in float
    with holding(session.model, {key: one.decode() for key, one in encoded.items()}):
        assert losses.nearest == pytest.approx(by_hand(session.model, tokens), rel=1e-5)
    if session.run is None:
        assert losses.latent == pytest.approx(by_hand(session.model, tokens), rel=1e-5)
    else:
        with session.run.latent():
            assert losses.latent == pytest.approx(by_hand(session.model, tokens), rel=1e-5)
    assert losses.nearest != losses.latent
    assert losses.randomized not in (losses.nearest, losses.latent)


def test_a_draw_lies_on_the_grid_that_ships_and_draws_differ(tokens):
    session = after(tokens, "int2_1m")
    assert measured(session, draws=1).randomized == measured(session, draws=1).randomized
    assert measured(session, draws=1).randomized != measured(session, draws=2).randomized


def test_processes_share_the_rows_and_their_sum_is_the_same(tokens):
    session = after(tokens, "fp_1m")
    whole = measured(session).latent
    sums = []

    class Share(Ranks):
        """A process whose sum over all is left to the test."""

        def total(self, value):
            sums.append(float(value))
            return value

    for rank in range(4):  # 9 rows: 3 each, the last process has none of its own and still runs the model
        evaluate(session.model, None, session.recipe, tokens.held, Share(rank, 4, here("cpu").device))
    held_rows = min(9, tokens.held.sequences(16))
    assert sum(sums[::2]) / (held_rows * 16) == pytest.approx(whole, rel=1e-6)


def test_holding_gives_back_what_was_there_after_an_error_too(tokens):
    session = session_of(tiny("fp_1m"), tokens)
    name = "model.layers.0.mlp.up_proj.weight"
    before = session.model.get_parameter(name).detach().clone()

    def fail_inside():
        with holding(session.model, {name: torch.zeros_like(before)}):
            assert not session.model.get_parameter(name).any()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(session.model.get_parameter(name), before)
