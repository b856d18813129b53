"""Extras: other people's file formats and runtimes, imported where they are used and missed with one clear error."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def need(*modules: str, extra: str) -> None:
    """Refuse to go on without the modules of an extra.

    Raises:
        ModuleNotFoundError: one of them is not installed; names the command that installs all.
    """
    missing = [name for name in modules if (name in sys.modules and sys.modules[name] is None) or find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'{", ".join(missing)} not found: this needs the extra `{extra}`. Run: pip install "stepwell[{extra}]"')


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers, and what it imports, from drawing bars and printing advice while it loads or saves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from transformers.utils import logging as theirs

        bars = theirs.is_progress_bar_enabled()
        theirs.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                theirs.enable_progress_bar()
    finally:
        logging.disable(before)
