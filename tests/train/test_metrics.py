"""Metrics: lines of JSON that survive a kill, TensorBoard files that its own reader reads, and errors for trackers that are not there."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from stepwell.train.metrics import BOARD, FILE, Metrics, read


def test_numbers_that_are_not_finite_become_null(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, {"loss": 2.5, "flips": math.nan})
    metrics.close()
    assert read(tmp_path) == [{"step": 1, "loss": 2.5, "flips": None}]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, {"loss": 1.0})
    assert json.loads((tmp_path / FILE).read_text()) == {"step": 1, "loss": 1.0}
    metrics.close()


def test_what_comes_after_the_checkpoint_is_cut_off(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "l')
    Metrics(tmp_path, done=3).close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path).close()
    assert read(tmp_path) == []


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, tracker="tensorboard")
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1 / step})
    metrics.close()
    board = EventAccumulator(str(tmp_path / BOARD)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_weights_and_biases_is_given_the_same_numbers(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    asked = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: asked.update(options) or run))
    metrics = Metrics(tmp_path / "", tracker="wandb")
    metrics.write(4, {"loss": 1.5, "flips": math.nan})
    metrics.close()
    assert logged == [(4, {"loss": 1.5}), "end"]
    assert (asked["resume"], asked["id"]) == ("allow", tmp_path.name)


@pytest.mark.parametrize(
    ("tracker", "module", "said"), [("tensorboard", "tensorboard", r"stepwell\[track\]"), ("wandb", "wandb", "pip install wandb")]
)
def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, tracker, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=said):
        Metrics(tmp_path, tracker=tracker)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`track` must be tensorboard or wandb: got 'mlflow'"):
        Metrics(tmp_path, tracker="mlflow")
