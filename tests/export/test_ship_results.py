"""The committed matrix of targets by architectures: every target is in it, and every cell passed or says why there is none."""

import json
from pathlib import Path

import stepwell as sw

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_every_target_was_tried_on_every_architecture():
    cells = json.loads((RESULTS / "ship_matrix.json").read_text())["cells"]
    architectures = {key.partition(" | ")[2] for key in cells}
    assert {"Llama", "Qwen 3", "OLMo 2", "BERT", "convolutions", "Llama 15M"} == architectures
    for target in sw.targets():
        for architecture in architectures:
            found = [cell for key, cell in cells.items() if key.startswith(target.name) and key.endswith(f"| {architecture}")]
            assert found, f"{target.name} on {architecture}: run benchmarks/ship_matrix.py"
            for cell in found:
                assert cell.get("reason") or (cell["passed"] and cell["codes"] and cell["scales"] and cell["values"])
                assert "reason" in cell or cell["remainder"] <= cell["tolerance"]


def test_every_block_type_ran_in_llama_cpp():
    rows = json.loads((RESULTS / "ship_llama_cpp.json").read_text())["rows"]
    types = {row["type"] for row in rows}
    assert types == {target.name.partition(":")[2] for target in sw.targets() if target.name.startswith("gguf:")}
    assert all(row["passed"] and row["kernels"] < 1e-5 for row in rows)
