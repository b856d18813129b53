"""The scripts for a GPU at toy size on a CPU: they run to their table and write what they say. Their numbers mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def result(script, out, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / script), "--toy", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout.splitlines()


def test_methods_are_compared_on_the_same_sequences(tmp_path):
    found, lines = result("methods.py", tmp_path / "out.json", "--bits", "2", "--lr", "3e-3")
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["float", "rtn", "scale search", "gptq", "ste", "lotion", "ste + lotion"]
    assert rows["ste"]["to_ste"] is None
    for name in ("rtn", "scale search", "gptq", "lotion", "ste + lotion"):
        assert rows[name]["to_ste"] == pytest.approx(rows[name]["loss"] - rows["ste"]["loss"], abs=1e-12)
        assert rows[name]["interval"] > 0
    assert rows["float"]["loss"] < 5.5  # 256 bytes at random are 5.545
    assert len(lines) == 2 + len(rows)


@pytest.mark.slow
def test_updates_are_those_of_float64(tmp_path):
    pytest.importorskip("torch._inductor")
    found, _ = result("updates.py", tmp_path / "out.json")
    assert {row["path"] for row in found["rows"]} >= {"eager", "compiled"}
    assert all(row["good"] for row in found["rows"])


@pytest.mark.slow
def test_steps_are_timed_and_weighed(tmp_path):
    pytest.importorskip("torchao")
    found, _ = result("steps.py", tmp_path / "out.json")
    rows = found["variants"]
    assert list(rows) == ["plain", "ste", "lotion", "ste + lotion", "torchao qat", "torchao parq"]
    assert rows["plain"]["ratio"] == 1
    assert all(row["tokens_per_second"] > 0 and row["memory_mb"] > 0 for row in rows.values())
