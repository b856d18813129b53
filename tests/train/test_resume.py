"""Resume: killed at any moment, also while saving, a run ends on the weights of one that was never stopped; all damage is survived."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.killable import KILLED, run
from tests.language import SMALL, text_folder, tiny, tokens_in

from stepwell.train import checkpoint, pretrain
from stepwell.train.metrics import FILE, read
from stepwell.train.pretrain import CHECKPOINTS, RUN


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tokens_in(tmp_path_factory.mktemp("tokens")).folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """The files of a run that nobody killed, and the seconds that it took."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(out, data)  # the first process also starts the server
    shadow = out.with_name("again")
    code, seconds = run(shadow, data)
    assert code == 0
    assert ended_alike(out, shadow)
    return out, seconds


def ended_alike(one, other):
    """Whether two runs ended on the same bits: model, latent weights, moments, what is shipped, and every loss on the way."""
    tensors = [f"{CHECKPOINTS}/step-000000012/model-00001-of-00001.safetensors", "model/model.safetensors", "model/encoded.safetensors"]
    for name in tensors:
        ours, theirs = load_file(one / name), load_file(other / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return [(line["step"], line["loss"]) for line in read(one)] == [(line["step"], line["loss"]) for line in read(other)]


def test_killed_twice_and_resumed_it_ends_on_the_same_weights(data, undisturbed, tmp_path):
    whole, seconds = undisturbed
    chance = random.Random(0)
    kills = 0
    for attempt in range(20):
        code, _ = run(tmp_path / "a", data, resume=attempt > 0, kill_after=chance.uniform(0, 0.5) * seconds)
        kills += code == KILLED
        if kills == 2:
            break
    assert kills == 2
    assert run(tmp_path / "a", data, resume=True)[0] == 0
    assert ended_alike(whole, tmp_path / "a")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_every_resume_ends_on_the_same_weights(data, undisturbed, tmp_path):
    whole, seconds = undisturbed
    chance = random.Random(1)
    kills, saving, steps = 0, 0, set()
    for number in range(60):
        out = tmp_path / str(number)
        code, _ = run(out, data, kill_after=chance.uniform(0, 1) * seconds)
        if code != KILLED:
            continue
        kills += 1
        saving += any((out / CHECKPOINTS).glob(".step-*"))
        steps.add(max((facts["step"] for facts in map(checkpoint.facts_of, (out / CHECKPOINTS).glob("step-*"))), default=0))
        assert run(out, data, resume=True)[0] == 0
        assert ended_alike(whole, out), f"kill {kills}, found {sorted(steps)}"
        if kills == 20:
            break
    assert kills == 20
    assert saving >= 1, "none of the kills fell into a save"
    assert len(steps) >= 3, "the kills fell into one stretch"


@pytest.fixture(scope="module")
def stopped_once(data, tmp_path_factory):
    """A run that stopped after its checkpoints of steps 2 and 4, and the state of the same run undisturbed."""
    recipe, root = tiny(steps=6, save_every=2), tmp_path_factory.mktemp("stopped")
    whole = pretrain.pretrain(recipe, root / "whole", data=data)

    def stop(seen):
        if seen.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(recipe, root / "a", data=data, watch=stop)
    return recipe, root / "a", whole


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The same in a copy of its own."""
    recipe, out, whole = stopped_once
    return recipe, shutil.copytree(out, tmp_path / "a"), whole


def spoil(path):
    path.write_bytes(path.read_bytes()[:-7])


def test_a_damaged_newest_checkpoint_is_passed_over_with_words(stopped, data):
    recipe, out, whole = stopped
    spoil(out / CHECKPOINTS / "step-000000004" / "model-00001-of-00001.safetensors")
    words = []
    session = pretrain.pretrain(recipe, out, data=data, resume=True, watch=lambda seen: words.append(seen.words))
    assert any("step-000000004 is damaged" in word and "The one before it is used" in word for word in words)
    assert "resumed after step 2" in words
    ours, theirs = (checkpoint.flat(one.model, one.optimizer) for one in (session, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_a_whole_checkpoint_the_run_is_refused(stopped, data):
    recipe, out, _ = stopped
    for path in (out / CHECKPOINTS).glob("*/model-*"):
        spoil(path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        pretrain.pretrain(recipe, out, data=data, resume=True)


def test_metrics_go_on_without_a_gap_or_a_repetition(stopped, data):
    recipe, out, _ = stopped
    assert [line["step"] for line in read(out)] == [1, 2, 3, 4, 5]
    with (out / FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # as a kill leaves it
    pretrain.pretrain(recipe, out, data=data, resume=True)
    assert [line["step"] for line in read(out)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_with_a_run_is_not_written_over(stopped, data):
    recipe, out, _ = stopped
    with pytest.raises(ValueError, match=r"`out`: .* holds a run already. Go on with it by --resume"):
        pretrain.pretrain(recipe, out, data=data)


def test_another_recipe_or_other_data_cannot_resume_a_run(stopped, data, tmp_path):
    _, out, _ = stopped
    with pytest.raises(ValueError, match=r"`resume`: .* was started otherwise: steps was 6, is 7"):
        pretrain.pretrain(tiny(steps=7, save_every=2), out, data=data, resume=True)
    with pytest.raises(ValueError, match=r"data was .*, is "):
        pretrain.pretrain(tiny(steps=6, save_every=2), out, data=text_folder(tmp_path / "other"), resume=True)


def test_tokens_that_changed_under_a_run_are_refused(stopped, data, tmp_path):
    recipe, out, _ = stopped
    told = json.loads((out / RUN).read_text())
    other = tokens_in(tmp_path / "other", texts=50).folder
    (out / RUN).write_text(json.dumps({**told, "data": str(other)}))
    with pytest.raises(ValueError, match=r"`data`: .* was trained on other tokens"):
        pretrain.pretrain(recipe, out, data=str(other), resume=True)


def test_resume_of_nothing_begins(data, tmp_path):
    words = []
    pretrain.pretrain(tiny(steps=2), tmp_path / "a", data=data, resume=True, watch=lambda seen: words.append(seen.words))
    assert "no checkpoint yet: beginning at the first step" in words


def test_a_finished_run_can_be_resumed_and_stays(data, tmp_path):
    first = pretrain.pretrain(tiny(steps=2), tmp_path / "a", data=data)
    again = pretrain.pretrain(tiny(steps=2), tmp_path / "a", data=data, resume=True)
    ours, theirs = (checkpoint.flat(one.model, one.optimizer) for one in (first, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_model_whose_vocabulary_is_too_small_for_the_tokens_is_refused(data, tmp_path):
    small = tiny(architecture=SMALL._replace(vocabulary=200))
    with pytest.raises(ValueError, match=r"tokens of a vocabulary of \d+, the model knows 200"):
        pretrain.pretrain(small, tmp_path / "a", data=data)


def test_a_stop_for_a_bad_number_keeps_the_last_checkpoint_and_names_it(data, tmp_path, monkeypatch):
    real = pretrain.advance

    def advance(session, step):
        if step == 3:
            with torch.no_grad():
                session.model.get_parameter("model.norm.weight")[0] = torch.nan
        return real(session, step)

    monkeypatch.setattr(pretrain, "advance", advance)
    with pytest.raises(ArithmeticError, match=r"stopped at step 4: .*model.norm.weight.*last good checkpoint is .*step-000000002.*`lr`"):
        pretrain.pretrain(tiny("fp_1m", save_every=2), tmp_path / "a", data=data)
    assert checkpoint.latest(tmp_path / "a" / CHECKPOINTS)[0].name == "step-000000002"
