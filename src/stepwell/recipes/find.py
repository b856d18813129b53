"""Find: the recipe that a user names, ours or one of their own."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from stepwell.train.recipe import Recipe

OURS = "recipes."


def find(name: str) -> Recipe:
    """Return the recipe that a function without arguments makes.

    Args:
        name: `recipes.lm:NAME` for ours, `module:function`, importable from the current folder too, or `file.py:function`.

    Raises:
        ImportError: the module itself imports something that is not installed.
        ValueError: no such module, function or recipe; lists what is known.
    """
    target, _, function = name.rpartition(":")
    if not target or not function:
        raise ValueError(f"`recipe` must be recipes.lm:NAME, module:function or file.py:function: got {name!r}. {_known()}")
    module = _module(f"stepwell.{target}" if target.startswith(OURS) else target, name)
    make = getattr(module, function, None)
    if not callable(make):
        offered = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_") and not isinstance(value, type)
        ]
        mine = module.__name__.startswith("stepwell.")
        raise ValueError(
            f"`recipe`: there is no {function!r} in {target}. {_known() if mine else 'Functions there: ' + ', '.join(offered[:12]) + '.'}"
        )
    made = make()
    if not isinstance(made, Recipe):
        raise ValueError(f"`recipe`: {name} must return a Recipe: got {type(made).__name__}. `dataclasses.replace` one of recipes.lm.")
    return made


def _module(target: str, name: str) -> ModuleType:
    """Import a module by its name or its file."""
    if target.endswith(".py"):
        path = Path(target).resolve()
        specification = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or specification is None or specification.loader is None:
            raise ValueError(f"`recipe`: there is no file {target!r}.")
        module = importlib.util.module_from_spec(specification)
        sys.modules.setdefault(path.stem, module)  # dataclasses inside it look it up
        specification.loader.exec_module(module)
        return module
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not (target == error.name or target.startswith(f"{error.name}.")):
            raise  # the module is there, and misses something
        raise ValueError(f"`recipe`: there is no module {target!r} for {name!r}. {_known()}") from error


def _known() -> str:
    from stepwell.recipes import lm

    return f"Known: recipes.lm:NAME, with NAME as {lm.known()}."
