"""Artifact: a folder that is written aside and then renamed, so that there is the old one or the new one and never half of either."""

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

CERTIFICATE = "certificate.json"  # in every folder of ours, which is how we know one
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_AT_FDCWD, _EXCHANGE = -100, 2  # Linux: relative to the current folder; swap two names in one step


def check_place(out: Path, *, force: bool) -> None:
    """Refuse a place that cannot be written, or that holds something which is not to be replaced; nothing is made.

    Raises:
        ValueError: a file, a folder of something else, an artifact without `force`, or a place without room for a new name.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"`out` must be a folder: got {out}, which is a {'link' if out.is_symlink() else 'file'}.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / CERTIFICATE).is_file():
            raise ValueError(f"`out`: the folder {out} holds other files, and has no {CERTIFICATE} as our artifacts do. Give another one.")
        if not force:
            raise ValueError(f"`out`: the folder {out} holds an artifact already. Give another one, or --force to replace it.")
    place = next(path for path in out.absolute().parents if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"`out`: cannot write into the folder {place}. Give another one.")


@contextmanager
def draft(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out`; where the block ends well it takes the name, where it fails it is removed.

    A kill leaves a hidden folder `.NAME.*.part`, which can be deleted, and what was at `out` as it was.

    Args:
        out: the artifact's folder; made, or replaced where `force` and an artifact of ours is there.
        force: whether an artifact may be replaced.

    Raises:
        ValueError: what `check_place` refuses.
        OSError: the disk is full or fails; in one sentence.
    """
    check_place(out, force=force)
    out = out.absolute()
    aside = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        aside.mkdir(parents=True)
        yield aside
        check_place(out, force=force)  # somebody else may have come first
        _publish(aside, out)
    except (OSError, SafetensorError) as error:
        if not _ours(error, aside):
            raise
        words = getattr(error, "strerror", None) or str(error)
        raise OSError(f"writing {out} failed: {words}. What was there before is untouched.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, out: Path) -> None:
    """Give a finished folder its name; one that is there goes away after the new one has come."""
    if not out.exists() or not any(out.iterdir()):
        os.rename(aside, out)  # over an empty folder too
        return
    if not _exchange(aside, out):
        old = aside.with_suffix(".old")
        os.rename(out, old)
        os.rename(aside, out)
        os.rename(old, aside)  # removed by the caller


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names in one step where the system can; say whether it did."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _EXCHANGE) == 0)


def _ours(error: Exception, aside: Path) -> bool:
    """Say whether an error comes from writing the artifact: a full disk, or a file inside it."""
    if not isinstance(error, OSError):
        return "os error" in str(error)  # how safetensors passes the system's on
    return error.errno in FULL or (error.filename is not None and Path(os.fsdecode(error.filename)).absolute().is_relative_to(aside))
