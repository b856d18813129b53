"""Aside: a file or folder is written under another name and renamed when complete: the old one or the new one, never half of either."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a name beside a file; where the block ends well it takes the file's place, where it fails it is removed.

    Raises:
        FileNotFoundError, IsADirectoryError: no such folder, or a folder in the file's place.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be a file: got the folder {path}. Name a file in it.")
    aside = _beside(path)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside another; where the block ends well it takes its name, where it fails it is removed.

    What a new folder replaces is moved out of the way, and removed once the new one is in its place; a kill between those two leaves it
    complete as `.NAME.*.old`.

    Args:
        path: the folder; new, empty, or one that `ours` knows as an earlier export.
        ours: whether a folder with files in it may be replaced.

    Raises:
        FileNotFoundError: no folder to put it in.
        ValueError: a file in its place, or a folder of something else.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`folder`: no folder {path.parent}. Make it first.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"`folder` must be a folder: got the file {path}.")
    full = path.is_dir() and any(path.iterdir())
    if full and not ours(path):
        raise ValueError(f"`folder`: {path} holds files that no export of this kind wrote. Give a new or an empty folder.")
    aside = _beside(path)
    try:
        aside.mkdir()
        yield aside
        if not full:
            os.rename(aside, path)  # over an empty folder too
        else:
            old = aside.with_suffix(".old")
            os.rename(path, old)
            try:
                os.rename(aside, path)
            except BaseException:
                os.rename(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return a hidden name in the same folder that nothing has."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
