"""Every example runs as it stands, in an empty directory, and is short enough to read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_short(script, tmp_path):
    assert len(script.read_text().splitlines()) <= 60
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"
    assert "Warning" not in done.stderr, done.stderr


def test_there_are_examples():
    assert EXAMPLES
