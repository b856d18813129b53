"""docs/methods.md shows what the committed results say: its tables are the ones that the benchmarks would write."""

import importlib
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("module", "results"),
    [("estimating.summary", "estimators_table.csv"), ("estimators_images", "estimators_images_table.csv")],
)
def test_tables_are_those_of_the_results(monkeypatch, tmp_path, module, results):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    writer, page = importlib.import_module(module), tmp_path / "methods.md"
    shutil.copy(ROOT / "docs" / "methods.md", page)
    before = page.read_text()
    rows = writer.read(ROOT / "benchmarks" / "results" / results)
    assert rows
    writer.document(rows, page)
    assert page.read_text() == before, "run the benchmark again with --tables"
    writer.document(rows[: len(rows) // 2], page)
    assert page.read_text() != before  # the marks are there: something is written between them
