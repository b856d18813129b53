"""Where kernels come from: compiled once and kept, for this process alone where nothing can be kept, and something else where it fails."""

import os
import stat
import sys
from importlib.resources import files

import pytest

from stepwell.optim import build, engines

needs_compiler = pytest.mark.skipif(build.found_compiler() is None, reason="no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Use an empty cache directory, and a source that compiles in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "kernel.c"
    source.write_text("void stepwell_adamw(void) {}\n")
    monkeypatch.setattr(build, "SOURCE", source)
    return tmp_path / "stepwell"


def runs(compile_calls, monkeypatch):
    """Record compilations."""
    real = build._compile

    def compiling(*arguments):
        compile_calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(build, "_compile", compiling)


@needs_compiler
def test_compiled_once_and_kept(cache, monkeypatch):
    calls: list = []
    runs(calls, monkeypatch)
    assert build.library() is not None
    assert build.library() is not None
    assert len(calls) == 1
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_compiler
def test_damaged_file_is_replaced(cache):
    cache.mkdir()
    kept = cache / f"kernel-{build._digest(build.found_compiler(), (*build.FLAGS, build.NATIVE))}.so"
    kept.write_bytes(b"not a library")
    assert build.library() is not None
    assert kept.stat().st_size > 1000


@needs_compiler
def test_another_processor_another_compiler_other_flags_another_file(cache, monkeypatch):
    compiler = build.found_compiler()
    names = {build._digest(compiler, build.FLAGS), build._digest(compiler, (*build.FLAGS, build.NATIVE))}
    monkeypatch.setattr(build, "_processor", lambda: b"another")
    names.add(build._digest(compiler, build.FLAGS))
    build.SOURCE.write_text("void stepwell_adamw(int other) {}\n")
    names.add(build._digest(compiler, build.FLAGS))
    assert len(names) == 4


@needs_compiler
@pytest.mark.parametrize("place", ["a file where the folder should be", "a folder that others may write to", "a folder that nobody may"])
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(place, cache):
    if place.startswith("a file"):
        cache.write_text("")
    elif place.endswith("others may write to"):
        cache.mkdir()
        cache.chmod(0o777)
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        cache.mkdir(mode=0o500)
    assert build.library() is not None
    assert not cache.is_dir() or not list(cache.iterdir())


def test_machine_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache.parent))
    monkeypatch.delenv("CC", raising=False)
    assert build.found_compiler() is None
    assert build.library() is None


@pytest.mark.parametrize("script", ["exit 1", "sleep 5", "exit 0"], ids=["fails", "hangs", "writes nothing"])
def test_compiler_that_does_not_work(cache, tmp_path, monkeypatch, script):
    broken = tmp_path / "broken"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {script}\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(build, "PATIENCE", 0.5)
    assert build.found_compiler() == str(broken)
    assert build.library() is None
    assert not cache.exists() or not list(cache.iterdir())


def test_numba_is_next_and_then_nothing(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.delenv(engines.VARIABLE, raising=False)
    monkeypatch.setattr(engines, "load", engines.load.__wrapped__)
    best = engines.best.__wrapped__
    assert best().name == "numba"
    monkeypatch.delitem(sys.modules, "stepwell.optim.kernel_numba", raising=False)
    monkeypatch.delattr("stepwell.optim.kernel_numba", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert best() is None
    monkeypatch.setenv(engines.VARIABLE, "numba")
    with pytest.raises(ValueError, match=r"needs numba: pip install .stepwell\[fast\]"):
        best()
    monkeypatch.setenv(engines.VARIABLE, "c")
    with pytest.raises(ValueError, match="needs a C compiler"):
        best()


def test_environment_chooses(monkeypatch):
    monkeypatch.setattr(engines, "load", lambda name: engines.Engine(name, print))
    for asked, expected in (("", "c"), ("c", "c"), ("numba", "numba")):
        monkeypatch.setenv(engines.VARIABLE, asked)
        assert engines.best.__wrapped__().name == expected
    monkeypatch.setenv(engines.VARIABLE, "none")
    assert engines.best.__wrapped__() is None
    monkeypatch.setenv(engines.VARIABLE, "fortran")
    with pytest.raises(ValueError, match="must be one of c, numba, triton and none: got 'fortran'"):
        engines.best.__wrapped__()


def test_numba_without_a_place_for_its_cache_still_compiles(monkeypatch):
    """An installed wheel may lie in a folder that nobody may write to, and a service may have no home."""
    numba = pytest.importorskip("numba")
    from stepwell.optim import kernel_numba

    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    doubled = kernel_numba.compiled("f4(f4)")(lambda x: x + x)
    assert doubled(1.5) == 3.0


def test_the_source_is_shipped():
    assert files("stepwell.optim").joinpath("kernel.c").read_text().startswith("/* One optimizer step")


def test_kernel_for_gpus_is_missed_by_name(monkeypatch):
    from stepwell.optim import engines

    monkeypatch.setenv(engines.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engines.best.cache_clear()
    engines.load.cache_clear()
    try:
        with pytest.raises(ValueError, match="`STEPWELL_KERNEL=triton` needs a GPU, and triton"):
            engines.best()
    finally:
        engines.best.cache_clear()
        engines.load.cache_clear()
