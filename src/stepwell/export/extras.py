"""Extras: other people's file formats and runtimes, imported where they are used and missed with one clear error."""

import sys
from importlib.util import find_spec


def need(*modules: str, extra: str) -> None:
    """Refuse to go on without the modules of an extra.

    Raises:
        ModuleNotFoundError: one of them is not installed; names the command that installs all.
    """
    missing = [name for name in modules if (name in sys.modules and sys.modules[name] is None) or find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'{", ".join(missing)} not found: this needs the extra `{extra}`. Run: pip install "stepwell[{extra}]"')
