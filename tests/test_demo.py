"""The demo end to end on a shortened run: every file, every number consistent; and, slowly, what it claims."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest

from stepwell.commands.demo import ONNX_FILE, PAGE_FILE, PICTURE_FILE, RESULTS_FILE, demo
from stepwell.recipes import digits as recipes

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A demo of 22 short training runs: its folder and what it printed for machines and for people."""
    folder = tmp_path_factory.mktemp("demo")
    short = replace(recipes.quick_digits(), base_steps=120, steps=30, seeds=(0, 1), draws=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "quick_digits", lambda: short)
        demo(out=folder, quick=True)
    return folder


@pytest.fixture(scope="module")
def results(told):
    return json.loads((told / RESULTS_FILE).read_text())


def test_results_hold_every_method_at_every_width_and_every_trial(results):
    rows = {(row["arm"], row["bits"]) for row in results["summary"]}
    methods = {recipes.RTN, recipes.SEARCHED, *recipes.TRAINED}
    assert rows == {(name, bits) for name in methods for bits in (4, 3, 2)} | {("full precision", 32)}
    assert len(results["trials"]) == 2 * 16
    for row in results["summary"]:
        mine = [trial for trial in results["trials"] if (trial["arm"], trial["bits"]) == (row["arm"], row["bits"])]
        mean = sum(trial["nearest"]["loss"] for trial in mine) / 2
        assert row["loss"]["mean"] == pytest.approx(mean, rel=1e-12)  # one learning rate: nothing was chosen


def test_what_runs_is_what_was_trained(told, results):
    """Checked without our own certificate: onnxruntime against the sum that MatMulNBits stands for, in float64."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    from stepwell.train.data import load_digits

    shipped = results["shipped"]
    rivals = [row for row in results["summary"] if row["bits"] == 4]
    assert shipped["arm"] == min(rivals, key=lambda row: row["validation_loss"])["arm"]
    certificate = shipped["certificate"]
    assert certificate["passed"]
    assert certificate["codes_equal"]
    assert certificate["scales_equal"]
    assert certificate["max_relative_error"] < 1e-5
    path, images = told / ONNX_FILE, load_digits().test
    model = onnx.load(str(path))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 3
    biases = iter([tensor for name, tensor in held.items() if name.endswith("bias")])
    x = images.pixels.numpy().astype(np.float64)
    for index, node in enumerate(nodes):
        packed, scales = held[node.input[1]], held[node.input[2]]
        size = {attribute.name: attribute.i for attribute in node.attribute}
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(size["N"], -1, 32).astype(np.float64) - 8  # low half first
        weight = (codes * scales.reshape(size["N"], -1, 1)).reshape(size["N"], -1)[:, : size["K"]]
        x = x @ weight.T + next(biases)
        if index < 2:
            x = np.where(x > 0, x, np.float32(0.1) * x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.pixels.numpy()})[0]
    assert np.abs(found - x).max() < 1e-5 * np.abs(x).max()
    accuracy = (found.argmax(1) == images.labels.numpy()).mean()
    assert accuracy == pytest.approx(shipped["accuracy"], abs=1e-12)


def test_page_says_what_the_results_say(told, results):
    text = re.sub(r"\s+", " ", (told / PAGE_FILE).read_text(encoding="utf-8"))
    for row in results["summary"]:
        assert f"{100 * row['accuracy']['mean']:.1f} %" in text
    for claim in results["claims"]:
        gain = claim["gain"]["mean"] / claim["gain"]["stderr"]
        assert f"a gain of {gain:.1f} standard errors" in text
        assert claim["holds"] == (gain > claim["asked"])
    for arm in (recipes.STE, recipes.LOTION, recipes.BOTH):
        assert arm in text
    assert text.count("<figcaption>") == text.count("<svg") == text.count("<details>") == 6
    assert (told / PICTURE_FILE).stat().st_size < 200_000


def test_the_page_says_where_the_penalty_exceeds_its_bound(told, results):
    """And nothing where it does not: a sentence per method and width, with the count of the record."""
    counts = Counter((trial["arm"], trial["bits"]) for trial in results["trials"] if trial["beyond_bound"])
    text = re.sub(r"\s+", " ", (told / PAGE_FILE).read_text(encoding="utf-8"))
    assert ("exceeds its stability bound" in text) == bool(counts)
    for (arm, bits), count in counts.items():
        assert f"{count} of 2 runs of {arm} at {bits} bits" in text


def test_distances_are_shares(results):
    for shares in results["distances"].values():
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)  # float32 counts


def test_table_fits_a_hundred_columns_and_json_is_all_there_is(tmp_path, monkeypatch, capsys):
    short = replace(recipes.quick_digits(), base_steps=20, steps=5, seeds=(0, 1), draws=1)
    monkeypatch.setattr(recipes, "quick_digits", lambda: short)
    demo(out=tmp_path, quick=True, seeds=2)
    printed = capsys.readouterr().out
    assert str(tmp_path / PAGE_FILE) in printed
    assert max(len(line) for line in printed.splitlines() if "Report:" not in line) <= 100
    demo(out=tmp_path, quick=True, json=True)
    again = json.loads(capsys.readouterr().out)
    assert {key: again[key] for key in ("summary", "claims")} == {
        key: json.loads((tmp_path / RESULTS_FILE).read_text())[key] for key in ("summary", "claims")
    }


def test_same_seeds_same_numbers(tmp_path, monkeypatch, results):
    short = replace(recipes.quick_digits(), base_steps=120, steps=30, seeds=(0, 1), draws=2)
    monkeypatch.setattr(recipes, "quick_digits", lambda: short)
    demo(out=tmp_path, quick=True)
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["trials"] == results["trials"]


def test_one_seed_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="`seeds` must be at least 2: got 1"):
        demo(out=tmp_path / "never", seeds=1)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("place", ["taken", "taken/demo", "/proc/demo"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(place, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    trained = []
    monkeypatch.setattr("stepwell.commands.demo.run", lambda *arguments: trained.append(arguments))
    with pytest.raises(ValueError, match=f"`out`: cannot write into the folder .*{place}.*--out"):
        demo(out=tmp_path / place, quick=True)
    assert not trained


@pytest.mark.parametrize("missing", ["sklearn", "onnx", "onnxruntime"])
def test_a_missing_extra_is_named_before_anything_is_trained(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r"stepwell\[demo\]"):
        demo(out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_what_the_demo_claims(tmp_path):
    """The whole demo, two minutes: accuracy, gains in standard errors, and the same networks under randomized rounding."""
    demo(out=tmp_path)
    told = json.loads((tmp_path / RESULTS_FILE).read_text())
    rows = {(row["arm"], row["bits"]): row for row in told["summary"]}
    assert rows["full precision", 32]["accuracy"]["mean"] >= 0.97
    assert [claim["holds"] for claim in told["claims"]] == [True, True]
    assert [claim["asked"] for claim in told["claims"]] == [2.0, 5.0]
    assert rows[recipes.LOTION, 2]["randomized_loss"]["mean"] < rows[recipes.STE, 2]["randomized_loss"]["mean"] / 3
    assert told["seconds"] < 180  # of one core
