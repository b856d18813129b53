"""The corpus: which files, in which part, in which order; pieces and batches of it."""

import hashlib

import pytest
import torch

from stepwell.train.corpus import byte_batches, load_corpus, sequences


@pytest.fixture
def library(tmp_path):
    """Twenty-three sources of known bytes, and files that do not belong."""
    for index in range(23):
        path = tmp_path / ("pack" if index % 2 else ".") / f"m{index:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([index]) * (index + 1))
    for name in ("site-packages/other.py", "test/test_x.py", "pack/tests/y.py", "_sysconfigdata_linux.py", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\xff" * 50)
    return tmp_path


def test_every_tenth_file_is_test_and_every_fifth_of_ten_validation(library):
    corpus = load_corpus(library)
    order = [*range(0, 23, 2), *range(1, 23, 2)]  # paths sort: m00, m02, .., then pack/m01, ..
    test, validation = [order[9], order[19]], [order[4], order[14]]
    train = [index for index in order if index not in test + validation]
    for part, indices in ((corpus.train, train), (corpus.validation, validation), (corpus.test, test)):
        assert part.tolist() == [value for index in indices for value in [index] * (index + 1)]
    assert corpus.files == (19, 2, 2)


def test_the_whole_library_has_its_tests_and_no_other_packages(library):
    plain, whole = load_corpus(library), load_corpus(library, whole=True)
    # two files of 50 bytes more, "pack/tests/y.py" and "test/test_x.py"; what a build generates and what others installed stay out
    assert sum(whole.files) == sum(plain.files) + 2
    assert sum(map(len, whole[:3])) == sum(map(len, plain[:3])) + 100
    assert whole.digest != plain.digest


def test_digest_is_of_paths_and_contents(library):
    before = load_corpus(library).digest
    assert load_corpus(library).digest == before
    (library / "notes.txt").write_bytes(b"not a source")
    assert load_corpus(library).digest == before
    (library / "m04.py").write_bytes(b"other")
    changed = load_corpus(library).digest
    assert changed != before
    expected = hashlib.sha256()
    for path in sorted([*library.glob("m*.py"), *library.glob("pack/*.py")], key=lambda path: path.relative_to(library).as_posix()):
        content = path.read_bytes()
        expected.update(f"{path.relative_to(library).as_posix()}\n{len(content)}\n".encode() + content)
    assert changed == expected.hexdigest()[:12]


def test_the_interpreters_library_is_large_enough_and_is_text():
    corpus = load_corpus()
    assert len(corpus.train) > 2_000_000
    assert min(len(corpus.validation), len(corpus.test)) > 200_000
    assert (corpus.train[:10_000] < 128).float().mean() > 0.99


def test_sequences_are_evenly_spaced_pieces():
    pieces = sequences(torch.arange(100, dtype=torch.uint8), length=4, count=3)
    assert pieces.tolist() == [list(range(start, start + 5)) for start in (0, 33, 66)]
    assert pieces.dtype == torch.int64
    with pytest.raises(ValueError, match=r"must fit the text: got 21 of 5 for 100 bytes"):
        sequences(torch.arange(100, dtype=torch.uint8), length=4, count=21)


def test_batches_are_pieces_from_anywhere_and_repeat_with_their_seed():
    text = torch.arange(200, dtype=torch.uint8)
    one, two, other = (torch.cat(list(byte_batches(text, size=400, length=7, steps=2, seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(one - one[:, :1], torch.arange(8).expand(800, 8))
    # every start from 0 to 192 can come; 800 draws leave each out with probability (192/193)^800 = .016, so at most 3 % are expected away
    assert one[:, 0].min() >= 0
    assert one[:, 0].max() <= 192
    assert len(one[:, 0].unique()) > 180
    with pytest.raises(ValueError, match="`length` \\+ 1 bytes must fit the text: got length=200"):
        next(byte_batches(text, size=1, length=200, steps=1, seed=0))


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="at least 10 Python sources: got 0"):
        load_corpus(tmp_path)
