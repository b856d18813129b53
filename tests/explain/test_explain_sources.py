"""Where model, loss and batches come from: functions that keep their promise, and every way to break it in one clear line."""

import json  # noqa: F401 - loaded, so that a file of its name can clash
import sys

import pytest

from stepwell.explain.sources import from_function

GOOD = """
from pathlib import Path
import torch
from torch import nn

def plain():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, lambda m, x: m(x).square().mean(), [torch.ones(3, 4) * k for k in range(5)]

def with_data(data):
    model, loss, batches = plain()
    return model, loss, batches[: len(Path(data).read_text().split())]

def may_take_data(data=None):
    return with_data(data) if data else plain()

def endless():
    def batches():
        k = 0
        while True:
            k += 1
            yield torch.ones(1, 4) * k
    return *plain()[:2], batches()

number = 4

def two():
    return plain()[:2]

def not_a_tuple():
    return plain()[0]

def wrong_model():
    return ("net", *plain()[1:])

def wrong_loss():
    model, loss, batches = plain()
    return model, 0.5, batches

def wrong_batches():
    return *plain()[:2], torch.ones(3, 4)

def no_batches():
    return *plain()[:2], []

def breaks():
    raise RuntimeError("the disk\\nis full")

def greedy(data, more):
    return plain()

def lacks():
    import a_module_that_nobody_has
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module, as the current one; what was imported from it is forgotten again."""
    (tmp_path / "subject_of_tests.py").write_text(GOOD)
    (tmp_path / "broken_module.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "text.txt").write_text("one two three")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.mark.parametrize("where", ["subject_of_tests", "subject_of_tests.py", "./subject_of_tests.py"])
def test_a_function_is_found_in_a_module_and_in_a_file(here, where):
    subject = from_function(f"{where}:plain", None, limit=12)
    assert (len(subject.batches), type(subject.model).__name__) == (5, "Linear")
    assert subject.loss(subject.model, subject.batches[1]).item() > 0


def test_a_file_that_is_called_like_a_library_does_not_replace_it(here):
    (here / "json.py").write_text(GOOD)
    before = sys.modules["json"]
    assert len(from_function("json.py:plain", None, limit=12).batches) == 5
    assert sys.modules["json"] is before


def test_a_file_may_import_its_neighbours(here):
    (here / "sub").mkdir()
    (here / "sub" / "helper_of_tests.py").write_text("from subject_of_tests import plain\n")
    (here / "sub" / "main_of_tests.py").write_text("from helper_of_tests import plain\n")
    assert from_function("sub/main_of_tests.py:plain", None, limit=1).batches[0].shape == (3, 4)


def test_data_reaches_a_function_that_takes_it(here):
    data = here / "text.txt"
    assert len(from_function("subject_of_tests:with_data", data, limit=12).batches) == 3
    assert len(from_function("subject_of_tests:may_take_data", data, limit=12).batches) == 3
    assert len(from_function("subject_of_tests:may_take_data", None, limit=12).batches) == 5


def test_no_more_batches_are_taken_than_asked_for(here):
    subject = from_function("subject_of_tests:endless", None, limit=4)
    assert [float(batch[0, 0]) for batch in subject.batches] == [1.0, 2.0, 3.0, 4.0]
    assert dict(subject.facts)["batches"] == "the first 4 (it offers more)"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("subject_of_tests", None, "`model` must be `module:function`"),
        (":plain", None, "`model` must be `module:function`"),
        ("no_such_module:f", None, "there is no module 'no_such_module'"),
        ("no/such/file.py:f", None, "there is no file 'no/such/file.py'"),
        ("subject_of_tests:missing", None, "has no function 'missing'. Functions there: plain, with_data"),
        ("subject_of_tests:number", None, "has no function 'number'"),
        ("broken_module:f", None, "importing broken_module failed with SyntaxError"),
        ("subject_of_tests:two", None, "must return (model, loss, batches): got tuple of 2"),
        ("subject_of_tests:not_a_tuple", None, "must return (model, loss, batches): got Linear"),
        ("subject_of_tests:wrong_model", None, "the first a torch module: got str"),
        ("subject_of_tests:wrong_loss", None, "the second a function `loss(model, batch)`: got float"),
        ("subject_of_tests:wrong_batches", None, "the third an iterable of batches: got Tensor"),
        ("subject_of_tests:no_batches", None, "are empty: got none"),
        ("subject_of_tests:breaks", None, "failed with RuntimeError: the disk is full ("),
        ("subject_of_tests:greedy", None, "must take at most one argument, the data: got data, more"),
        ("subject_of_tests:with_data", None, "`data` must be given: got none, and subject_of_tests:with_data takes 'data'"),
        ("subject_of_tests:plain", "text.txt", "`data` must not be given"),
        ("subject_of_tests:with_data", "missing.txt", "`data` must exist: got"),
    ],
)
def test_a_broken_promise_is_one_clear_line(here, name, data, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        from_function(name, None if data is None else here / data, limit=12)
    assert words in str(caught.value)


def test_the_place_of_a_failure_is_named(here):
    line = GOOD.split("\n").index('    raise RuntimeError("the disk\\nis full")') + 1
    with pytest.raises(ValueError, match=rf"subject_of_tests\.py:{line}\)"):
        from_function("subject_of_tests:breaks", None, limit=1)


@pytest.mark.parametrize("name", ["needs_more:f", "subject_of_tests:lacks"])
def test_what_is_not_installed_stays_an_import_error(here, name):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        from_function(name, None, limit=1)
