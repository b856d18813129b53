"""The README shows what is there: its tree and numbers are the generated ones, and its Python runs as it stands."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tree_and_tables_are_up_to_date():
    text = (ROOT / "README.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "readme.py"))["render"](text) == text, "run `python docs/readme.py`"


def test_python_blocks_run_in_an_empty_directory(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "passed" in done.stdout


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
