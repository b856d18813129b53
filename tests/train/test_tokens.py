"""Tokens: what is written is what is read, the order visits everything once an epoch, and a damaged file is refused by its name."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from stepwell.train import tokenized
from stepwell.train.ranks import Ranks
from stepwell.train.tokenized import Wanted, prepare
from stepwell.train.tokens import INDEX, Part, batch, open_tokens

WORDS = ("stair", "basin", "grid", "step", "well", "loss", "code", "scale")
TEXTS = [" ".join(WORDS[(7 * i + j * j) % 8] for j in range(30 + i)) for i in range(40)]
ORDER = [75, 95, 60, 0, 85, 80, 50, 40]
ALL = Wanted(10**9, 10**9)


def prepared(folder, texts=TEXTS, **options):
    prepare(lambda: iter(texts), folder / "data", **{"wanted": ALL, "vocabulary": 300} | options)
    return open_tokens(folder / "data")


def part_of(counts):
    """A part whose token number i is i, in files of these lengths."""
    ends = np.cumsum([0, *counts])
    return Part(tuple(np.arange(a, b, dtype=np.uint16) for a, b in pairwise(ends)), int(ends[-1]))


def test_tokens_decode_to_the_documents_and_every_tenth_is_held_out(tmp_path):
    from tokenizers import Tokenizer

    tokens = prepared(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data/tokenizer/tokenizer.json"))
    for part, expected in ((tokens.train, [t for i, t in enumerate(TEXTS) if i % 10 != 9]), (tokens.held, TEXTS[9::10])):
        numbers = np.concatenate(part.shards).tolist()
        assert tokenizer.decode(numbers, skip_special_tokens=False).split("<|endoftext|>")[:-1] == expected
    assert tokens.facts["dtype"] == "uint16"


def test_files_of_any_size_hold_the_same(tmp_path, monkeypatch):
    whole = prepared(tmp_path / "a")
    monkeypatch.setattr(tokenized, "SHARD", 101)
    cut = prepared(tmp_path / "b")
    assert len(whole.train.shards) == 1
    assert [len(shard) for shard in cut.train.shards[:-1]] == [101] * (len(cut.train.shards) - 1)
    rows = range(whole.train.sequences(17))
    assert torch.equal(whole.train.rows(rows, 17), cut.train.rows(rows, 17))


def test_the_same_data_gives_the_same_files(tmp_path):
    one, other = prepared(tmp_path / "a"), prepared(tmp_path / "b")
    assert one.facts == other.facts
    assert (one.folder / "tokenizer/tokenizer.json").read_bytes() == (other.folder / "tokenizer/tokenizer.json").read_bytes()


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    narrow = prepared(tmp_path / "a")
    monkeypatch.setattr(tokenized, "NARROW", 256)
    wide = prepared(tmp_path / "b")
    assert wide.facts["dtype"] == "uint32"
    assert torch.equal(wide.train.rows([3], 20), narrow.train.rows([3], 20))


def test_it_stops_at_the_tokens_that_are_wanted_and_leaves_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "CHUNK", 1)
    some = prepared(tmp_path, wanted=Wanted(200, 20))
    longest = len(max(TEXTS, key=len)) + 1
    assert 200 <= some.train.tokens < 200 + 10 * longest
    assert some.held.tokens >= 20
    assert prepared(tmp_path).facts == some.facts


def test_empty_and_unreadable_documents_are_counted_not_kept(tmp_path):
    plain = prepared(tmp_path / "a")
    mixed = prepared(tmp_path / "b", texts=["", *TEXTS[:20], None, "  \n", *TEXTS[20:]])
    assert (mixed.facts["empty"], mixed.facts["unreadable"], mixed.facts["documents"]) == (2, 1, 40)
    assert mixed.facts["parts"] == plain.facts["parts"]


@pytest.mark.parametrize("texts", [[], ["", " "], ["one short text"]], ids=["none", "empty", "short"])
def test_too_little_text_is_refused_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(ValueError, match=r"`data` is too short: \d documents with text, \d empty"):
        prepared(tmp_path, texts=texts)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    prepared(tmp_path / "a", vocabulary=320)
    with pytest.raises(ValueError, match=r"`tokenizer` has 293 tokens, the model's vocabulary is 280"):
        prepared(tmp_path / "b", vocabulary=280, tokenizer=str(tmp_path / "a/data/tokenizer"))
    assert not (tmp_path / "b").exists() or list((tmp_path / "b").iterdir()) == []


def test_an_unknown_tokenizer_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"`tokenizer`: .*folder' is no tokenizer that can be read"):
        prepared(tmp_path, tokenizer=str(tmp_path / "folder"))


def test_bytes_need_no_training(tmp_path):
    assert prepared(tmp_path, tokenizer="bytes").facts["vocabulary"] == 257


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:-2], "has .* bytes, its index says"),
        (lambda raw: raw[:50] + bytes([raw[50] ^ 1]) + raw[51:], "SHA-256 differs"),
        (lambda raw: None, "is missing"),
    ],
    ids=["cut", "one bit", "gone"],
)
def test_a_damaged_shard_is_refused_by_its_name(tmp_path, damage, said):
    shard = prepared(tmp_path).folder / "train-00000.bin"
    changed = damage(shard.read_bytes())
    shard.unlink() if changed is None else shard.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"`data`: the shard .*train-00000.bin .*{said}.* Remove"):
        open_tokens(tmp_path / "data")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', '{"version": 1}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    prepared(tmp_path)
    (tmp_path / "data" / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"tokens.json cannot be used"):
        open_tokens(tmp_path / "data")


def test_an_index_is_plain_json(tmp_path):
    assert json.loads((prepared(tmp_path).folder / INDEX).read_text())["parts"]["train"][0]["tokens"] > 0


def test_sequences_overlap_by_the_token_between_them():
    rows = part_of([7, 1, 13]).rows(range(4), 5)
    assert rows.tolist() == [[5 * k + i for i in range(6)] for k in range(4)]


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order():
    part, size = part_of([101]), 5
    assert part.sequences(5) == 20
    epochs = [[batch(part, range(size), step=4 * epoch + k, size=size, length=5, seed=3)[:, 0] for k in range(4)] for epoch in range(3)]
    orders = [torch.cat(steps).tolist() for steps in epochs]
    assert [sorted(order) for order in orders] == [list(range(0, 100, 5))] * 3
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_order_does_not_depend_on_the_world_size_or_on_what_was_read_before(size):
    part = part_of([200])
    whole = batch(part, range(6), step=9, size=6, length=5, seed=1)
    shares = [Ranks(rank, size, torch.device("cpu")).rows(6) for rank in range(size)]
    assert torch.equal(torch.cat([batch(part, share, step=9, size=6, length=5, seed=1) for share in shares]), whole)
    assert not torch.equal(batch(part, range(6), step=9, size=6, length=5, seed=2), whole)


def test_the_order_is_what_it_was():
    # a resumed run goes on with it, after an upgrade too: torch's permutation of 20 by the seed that (0, epoch 0) names
    assert batch(part_of([101]), range(8), step=0, size=8, length=5, seed=0)[:, 0].tolist() == ORDER
