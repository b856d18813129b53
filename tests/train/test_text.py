"""Text: documents of every kind of source, in one order, and errors that name the file and the line."""

import gzip
import json

import pytest

from stepwell.train.text import PIECE, documents


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, text in (("b/z.txt", "third"), ("a.py", "first"), ("b.md", "second"), (".hidden/c.txt", "no"), ("image.png", "no")):
        (tmp_path / name).write_text(text)
    assert sorted(documents(str(tmp_path))) == ["first", "second", "third"]
    assert list(documents(str(tmp_path))) == list(documents(str(tmp_path)))


def test_json_lines_plain_and_packed_give_their_texts(tmp_path):
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n\n" for text in ("one", "", "zwei ü"))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines.encode()))
    assert list(documents(str(tmp_path))) == ["one", "", "zwei ü"] * 2


def test_parquet_of_c4s_schema_gives_its_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", None, "three"], "timestamp": [1, 2, 3], "url": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "c4-train.00000.parquet")
    assert list(documents(str(tmp_path))) == ["one", "", "three"]
    parquet.write_table(table.drop_columns("text"), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet has no column 'text': it has timestamp, url"):
        list(documents(str(tmp_path / "other.parquet")))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"no.parquet is no readable parquet file"):
        list(documents(str(tmp_path / "no.parquet")))


def test_a_long_text_is_cut_at_the_ends_of_lines(tmp_path):
    text = "".join(f"line {i}\n" for i in range(30_000))
    (tmp_path / "long").write_text(text)
    pieces = list(documents(str(tmp_path / "long")))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(len(piece) <= PIECE and piece.endswith("\n") for piece in pieces)


def test_a_line_without_end_is_cut_anyway(tmp_path):
    (tmp_path / "one.txt").write_text("x" * (2 * PIECE + 5))
    assert [len(piece) for piece in documents(str(tmp_path / "one.txt"))] == [PIECE, PIECE, 5]


def test_a_file_that_is_no_text_is_marked(tmp_path):
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    assert list(documents(str(tmp_path))) == [None]


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', "[1]", '{"text": 5}'])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*a.jsonl"):
        list(documents(str(tmp_path)))


def test_packed_lines_that_are_cut_off_or_not_packed_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text("x")
    with pytest.raises(ValueError, match=r"`data`: .*a.jsonl.gz cannot be read as lines of JSON: Not a gzipped file"):
        list(documents(str(tmp_path)))
    whole = gzip.compress(b'{"text": "a stair that goes down to the water"}\n' * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read as lines of JSON"):
        list(documents(str(tmp_path)))
    (tmp_path / "a.jsonl.gz").unlink()
    (tmp_path / "b.jsonl").write_bytes('{"text": "ü"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"b.jsonl cannot be read as lines of JSON: 'utf-8' codec"):
        list(documents(str(tmp_path)))


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        documents(str(tmp_path))
    with pytest.raises(ValueError, match="there is no file or folder"):
        documents(str(tmp_path / "missing.jsonl"))


def test_a_dataset_that_cannot_be_reached_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"'c4' is no file or folder here.*no network.*Without a network, download"):
        list(documents("c4"))


def test_a_dataset_is_streamed_by_its_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or [{"text": "a"}, {"text": "b"}]
    )
    assert list(documents("c4")) == ["a", "b"]
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_without_data_the_interpreters_own_sources_are_read():
    texts = documents(None)
    assert "def " in "".join(text for _, text in zip(range(5), texts, strict=False) if text)
