"""Checkpoints: what is written is what is read, damage is refused by name, a full disk leaves the old ones, and nothing is pickled."""

import json
import pickle
import resource

import pytest
import torch
from safetensors.torch import load_file
from tests.language import session_of, tiny, tokens_in

from stepwell.train import checkpoint
from stepwell.train.checkpoint import FACTS, DamagedError, flat, latest, load, save, verified
from stepwell.train.session import advance

TENSORS = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokens_in(tmp_path_factory.mktemp("tokens"))


def after(tokens, steps, name="int4_1m_both", **changes):
    session = session_of(tiny(name, **changes), tokens)
    for step in range(steps):
        advance(session, step)
    return session


@pytest.fixture(scope="module")
def stepped(tokens):
    """A session after its first step, which the tests save and leave as it is."""
    return after(tokens, 1)


def saved(root, session, step):
    return save(root, session.model, session.optimizer, step=step, facts={"rows_read": 6 * step}, ranks=session.ranks)


def same(one, other):
    ours, theirs = flat(one.model, one.optimizer), flat(other.model, other.optimizer)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["fp_1m", "int4_1m_lotion", "int4_1m_prox", "int2_1m", "fp4_1m_both"])
def test_a_loaded_run_goes_on_as_if_it_had_never_stopped(tokens, tmp_path, name):
    session = after(tokens, 3, name)
    folder = saved(tmp_path, session, 3)
    fresh = session_of(session.recipe, tokens)
    assert load(folder, fresh.model, fresh.optimizer, ranks=fresh.ranks)["rows_read"] == 18
    assert same(session, fresh)
    for step in (3, 4):
        assert advance(session, step) == advance(fresh, step)
    assert same(session, fresh)


def test_a_tied_head_is_stored_once_and_still_tied_after_loading(tokens, tmp_path):
    session = after(tokens, 1)
    folder = saved(tmp_path, session, 1)
    names = load_file(folder / TENSORS).keys()
    assert "model.model.embed_tokens.weight" in names
    assert "model.lm_head.weight" not in names
    fresh = session_of(session.recipe, tokens)
    load(folder, fresh.model, fresh.optimizer, ranks=fresh.ranks)
    assert fresh.model.lm_head.weight is fresh.model.model.embed_tokens.weight
    assert torch.equal(fresh.model.lm_head.weight, session.model.lm_head.weight)


def test_nothing_is_pickled_or_unpickled(tokens, tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    session = after(tokens, 1)
    load(saved(tmp_path, session, 1), session.model, session.optimizer, ranks=session.ranks)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_the_last_two_are_kept_and_later_ones_of_a_course_given_up_are_not(stepped, tmp_path):
    session = stepped
    for step in (1, 2, 3, 9):
        saved(tmp_path, session, step)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000003", "step-000000009"]
    saved(tmp_path, session, 4)  # resumed from 3, for instance because 9 was damaged
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000003", "step-000000004"]


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "one bit": (lambda folder: flip(folder / TENSORS), "is not what was written"),
    "cut off": (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100]), "is not what was written"),
    "empty": (lambda folder: (folder / TENSORS).write_bytes(b""), "is not what was written"),
    "tensors gone": (lambda folder: (folder / TENSORS).unlink(), f"lacks {TENSORS}"),
    "facts gone": (lambda folder: (folder / FACTS).unlink(), f"its {FACTS} is missing or damaged"),
    "facts cut off": (lambda folder: (folder / FACTS).write_text((folder / FACTS).read_text()[:-30]), f"its {FACTS} is missing or damaged"),
    "facts of another kind": (lambda folder: (folder / FACTS).write_text("[1, 2]"), f"its {FACTS} is missing or damaged"),
    "facts that skip a file": (lambda folder: (folder / FACTS).write_text('{"version": 1, "step": 2, "sha256": {}}'), "layout version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(stepped, tmp_path, damage):
    session = stepped
    older, newer = saved(tmp_path, session, 1), saved(tmp_path, session, 2)
    spoil, said = DAMAGES[damage]
    spoil(newer)
    found, refused = latest(tmp_path)
    assert found == older
    assert len(refused) == 1
    assert str(newer) in refused[0]
    assert said in refused[0]
    with pytest.raises(DamagedError):
        load(newer, session.model, session.optimizer, ranks=session.ranks)


def test_where_none_is_whole_that_is_an_error_and_where_there_is_none_it_is_not(stepped, tmp_path):
    assert latest(tmp_path / "nothing") == (None, [])
    flip(saved(tmp_path, stepped, 1) / TENSORS)
    with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole: .*SHA-256 differs.* another folder"):
        latest(tmp_path)


def test_a_folder_left_half_written_is_no_checkpoint_and_is_swept_away(stepped, tmp_path):
    session = stepped
    folder = saved(tmp_path, session, 1)
    half = tmp_path / ".step-000000002.part"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half")
    assert latest(tmp_path) == (folder, [])
    saved(tmp_path, session, 3)
    assert not half.exists()


def test_a_full_disk_leaves_the_old_checkpoint(stepped, tmp_path):
    session = stepped
    folder = saved(tmp_path, session, 1)
    facts = verified(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond; the system then says why, as on a full disk
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 2 cannot be written .*File too large.* make room"):
            saved(tmp_path, session, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert verified(folder) == facts
    saved(tmp_path, session, 2)


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_read(tokens, tmp_path):
    folder = saved(tmp_path, after(tokens, 1), 1)
    other = session_of(tiny(architecture=tiny().architecture._replace(hidden=96)), tokens)
    before = {key: tensor.clone() for key, tensor in flat(other.model, other.optimizer).items()}
    with pytest.raises(ValueError, match=r"has shape .*: it is a checkpoint of another run"):
        load(folder, other.model, other.optimizer, ranks=other.ranks)
    deeper = session_of(tiny(architecture=tiny().architecture._replace(layers=3)), tokens)
    with pytest.raises(ValueError, match=r"layers.2.* is not there"):
        load(folder, deeper.model, deeper.optimizer, ranks=deeper.ranks)
    now = flat(other.model, other.optimizer)
    assert all(torch.equal(before[key], now[key]) for key in before)


def test_what_is_no_tensor_cannot_be_saved(tokens, tmp_path):
    session = after(tokens, 1, "fp_1m")
    next(iter(session.optimizer.state.values()))["note"] = "text"
    with pytest.raises(ValueError, match=r"`note` in the optimizer's state of .* is no tensor: got str"):
        saved(tmp_path, session, 1)
    assert list(tmp_path.iterdir()) == []


def test_facts_are_plain_json_with_the_digest_of_every_file(tokens, tmp_path):
    folder = saved(tmp_path, after(tokens, 2), 2)
    facts = json.loads((folder / FACTS).read_text())
    assert (facts["step"], facts["rows_read"], facts["world_size"]) == (2, 12, 1)
    assert facts["sha256"].keys() == {path.name for path in folder.iterdir()} - {FACTS}
    assert checkpoint.facts_of(folder) == facts
