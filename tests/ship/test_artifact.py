"""An artifact is the old one or the new one and never half of either: full disk, error, kill, and what must not be replaced."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from stepwell.ship import artifact
from stepwell.ship.artifact import CERTIFICATE, check_place, draft


def write(out, words, **options):
    with draft(out, **options) as folder:
        (folder / CERTIFICATE).write_text(words)
        (folder / "model.onnx").write_text(words)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_an_artifact_appears_whole_and_is_replaced_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, "old")
    assert contents(out) == {CERTIFICATE: "old", "model.onnx": "old"}
    with pytest.raises(ValueError, match=r"holds an artifact already.*--force"):
        write(out, "new")
    write(out, "new", force=True)
    assert contents(out) == {CERTIFICATE: "new", "model.onnx": "new"}
    assert os.listdir(out.parent) == ["out"]


def test_without_an_exchange_of_names_two_renames_do_it(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_exchange", lambda one, two: False)
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", force=True)
    assert contents(tmp_path / "out")["model.onnx"] == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_may_be_taken_and_any_other_may_not(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files, and has no certificate.json"):
        write(tmp_path / "mine", "new", force=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="must be a folder"):
            check_place(tmp_path / name, force=True)
    with pytest.raises(ValueError, match="cannot write into"):
        check_place(tmp_path / "file" / "out", force=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("`x`: 1")])
def test_a_failure_leaves_the_old_artifact_and_nothing_else(tmp_path, error):
    write(tmp_path / "out", "old")

    def fail():
        with draft(tmp_path / "out", force=True) as folder:
            (folder / CERTIFICATE).write_text("half of")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    if isinstance(error, OSError):
        assert "writing" in str(caught.value)
        assert "What was there before is untouched" in str(caught.value)
    assert contents(tmp_path / "out") == {CERTIFICATE: "old", "model.onnx": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_somebody_else_s_artifact_that_came_first_stays(tmp_path):
    def late():
        with draft(tmp_path / "out") as folder:
            (folder / CERTIFICATE).write_text("late")
            write(tmp_path / "out", "first")

    with pytest.raises(ValueError, match="holds an artifact already"):
        late()
    assert contents(tmp_path / "out")["model.onnx"] == "first"


def test_an_error_of_the_user_s_own_file_keeps_its_words(tmp_path):
    def fail():
        with draft(tmp_path / "out"):
            (tmp_path / "no such file").read_text()

    with pytest.raises(FileNotFoundError, match="no such file"):
        fail()


KILLED = """
import sys, time
from pathlib import Path
from stepwell.ship.artifact import CERTIFICATE, draft
with draft(Path(sys.argv[1]), force=True) as folder:
    (folder / CERTIFICATE).write_text("new")
    (folder / "model.onnx").write_text("new")
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_the_old_artifact(tmp_path):
    write(tmp_path / "out", "old")
    worker = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"written\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert contents(tmp_path / "out") == {CERTIFICATE: "old", "model.onnx": "old"}
    left = [name for name in os.listdir(tmp_path) if name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert left[0].endswith(".part")
    write(tmp_path / "out", "new", force=True)  # what was left behind is in nobody's way
