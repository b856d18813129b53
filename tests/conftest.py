"""What every test shares: property tests draw the same examples each time and are not timed one by one; `stepwell` in this process."""

import sys

import pytest
from hypothesis import settings

settings.register_profile("stepwell", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("stepwell")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `stepwell` in this process: (exit code, standard output, standard error)."""
    from stepwell import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stepwell", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def run_beside(run, monkeypatch, tmp_path):
    """Make `run` work in a folder of its own, beside a module of a given name and text, which every call imports anew."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    names = []

    def beside(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)

        def call(*arguments):
            sys.modules.pop(name, None)
            return run(*arguments)

        return call

    yield beside
    for name in names:
        sys.modules.pop(name, None)
