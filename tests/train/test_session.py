"""A step: whatever the micro-batches, the same; loss terms counted once; what is not finite is named before anything is changed."""

import copy
import math

import pytest
import torch
from tests.language import session_of, tiny, tokens_in
from torch.nn.functional import cross_entropy

from stepwell.train.blame import DivergedError, culprit
from stepwell.train.ranks import Ranks
from stepwell.train.session import advance, make_optimizer
from stepwell.train.tokens import batch


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokens_in(tmp_path_factory.mktemp("tokens"))


def latents(session):
    """All weights, the latent ones where there are any."""
    if session.run is None:
        return {name: p.detach().clone() for name, p in session.model.named_parameters()}
    with session.run.latent():
        return {name: p.detach().clone() for name, p in session.model.named_parameters()}


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens(tokens):
    recipe = tiny("fp_1m", micro=4)  # two micro-batches, of 4 rows and of 2
    session = session_of(recipe, tokens)
    rows = batch(tokens.train, range(6), step=0, size=6, length=16, seed=0)
    expected = cross_entropy(session.model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    # a mean of 96 float32 terms near 6, summed in another order
    assert advance(session, 0)["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize(("name", "micro"), [("fp_1m", 4), ("int4_1m_lotion", 1), ("int4_1m_both", 4), ("int4_1m", 4)])
def test_micro_batches_change_nothing_but_rounding_error(tokens, name, micro):
    # in float64 a gradient summed in another order differs by 1e-16 of its terms, and Adam's first steps divide by their own size;
    # an uneven last micro-batch, or loss terms counted per micro-batch, would move weights by a share of the rate 3e-3
    whole, parts = (session_of(tiny(name, micro=m), tokens, dtype=torch.float64) for m in (6, micro))
    for step in range(4):
        for session in (whole, parts):
            advance(session, step)
    ours, theirs = latents(whole), latents(parts)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-6


def test_the_methods_loss_terms_are_those_of_the_whole_step(tokens):
    session = session_of(tiny("int4_1m_lotion", micro=2), tokens)
    assert session.recipe.made_method().loss_terms == 6 * 16


def test_vectors_do_not_decay_and_every_parameter_is_stepped(tokens):
    session = session_of(tiny(), tokens)
    groups = make_optimizer(session.model, session.recipe).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(session.model.parameters()))


def test_the_gradient_is_clipped_to_its_norm(tokens):
    free, clipped = (session_of(tiny("fp_1m", clip=clip), tokens) for clip in (1e9, 1e-3))
    norms = [advance(session, 0)["gradient_norm"] for session in (free, clipped)]
    assert norms[0] == norms[1] > 1e-2
    moved = [next(iter(session.optimizer.state.values()))["exp_avg"].norm() for session in (free, clipped)]
    assert float(moved[1] / moved[0]) == pytest.approx(1e-3 / norms[0], rel=1e-3)


def broken(session, name, value=math.nan):
    with torch.no_grad():
        session.model.get_parameter(name).view(-1)[5] = value


@pytest.mark.parametrize("name", ["fp_1m", "int4_1m_lotion"])
def test_a_weight_that_is_no_number_stops_the_run_and_is_named(tokens, name):
    session = session_of(tiny(name), tokens)
    advance(session, 0)
    broken(session, "model.layers.1.mlp.up_proj.weight")
    before = copy.deepcopy(session.model.state_dict())
    with pytest.raises(DivergedError, match=r"step 2: .* is in the weight model.layers.1.mlp.up_proj.weight"):
        advance(session, 1)
    after = session.model.state_dict()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)


def test_the_first_layer_that_overflows_is_named(tokens):
    session = session_of(tiny("fp_1m"), tokens)
    with torch.no_grad():
        session.model.model.layers[1].mlp.up_proj.weight.fill_(3e38)  # finite; its product with any input of norm 1 is not
    with pytest.raises(DivergedError, match=r"is in the output of model.layers.1.mlp.up_proj"):
        advance(session, 0)


def test_a_gradient_that_is_no_number_is_named(tokens):
    session = session_of(tiny("fp_1m"), tokens)
    weight = session.model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"is in the gradient of model.layers.0.self_attn.o_proj.weight"):
        advance(session, 0)


def test_processes_agree_on_what_one_of_them_found(tokens):
    session = session_of(tiny("fp_1m"), tokens)

    class Other(Ranks):
        """The sum with a process that found the third parameter to be no number."""

        def total(self, value):
            return value + torch.eye(len(value))[2]

    names = [name for name, _ in session.model.named_parameters()]
    assert culprit(session.model, [], session.recipe, Other(0, 2, torch.device("cpu"))) == f"the weight {names[2]}"


def test_a_world_size_that_does_not_divide_is_refused(tokens):
    session = session_of(tiny("fp_1m"), tokens)._replace(ranks=Ranks(1, 4, torch.device("cpu")))
    with pytest.raises(ValueError, match="got 6 rows for 4 processes"):
        advance(session, 0)
