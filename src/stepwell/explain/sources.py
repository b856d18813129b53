"""Sources: where the model, the loss and the batches of `stepwell explain` come from: a Python function, or a folder (see `language`)."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from stepwell.advice.measure import BatchLoss

FORM = "`module:function`, `file.py:function` or a Hugging Face folder"


class Subject(NamedTuple):
    """What is explained.

    Attributes:
        name: as the user wrote it.
        model: in float.
        loss: of one batch.
        batches: at most as many as were asked for.
        unit: of the loss, in words.
        facts: name and value of what a reader should know about the source.
    """

    name: str
    model: nn.Module
    loss: BatchLoss
    batches: list[Any]
    unit: str
    facts: tuple[tuple[str, str], ...]


def from_function(name: str, data: Path | None, *, limit: int) -> Subject:
    """Call `module:function` or `file.py:function` and return what it gives: (model, loss, batches).

    Args:
        name: the module is importable, from the current folder too.
        data: passed to the function, as a Path, if it takes an argument.
        limit: most batches to take.

    Raises:
        ImportError: the module itself imports something that is not installed.
        ValueError: anything missing, failing or of another kind than promised; an argument that nobody takes.
    """
    target, _, attribute = name.rpartition(":")
    if not target or not attribute:
        raise ValueError(f"`model` must be {FORM}: got {name!r}.")
    if data is not None and not data.exists():
        raise ValueError(f"`data` must exist: got {str(data)!r}.")
    module = _module(target)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        offered = f"Functions there: {', '.join(known[:8])}." if known else "It holds no function."
        raise ValueError(f"`model`: {target!r} has no function {attribute!r}. {offered}")
    arguments = _arguments(name, function, data)
    given = attempted(lambda: function(*arguments), f"`model`: {name}")
    model, loss, batches = _checked(name, given)
    taken = attempted(lambda: list(islice(batches, limit + 1)), f"`model`: the batches of {name}")
    if not taken:
        raise ValueError(f"`model`: the batches of {name} are empty: got none.")
    more = " (it offers more)" if len(taken) > limit else ""
    facts = (("source", name), ("batches", f"the first {len(taken[:limit])}{more}"))
    return Subject(name, model, loss, taken[:limit], "own units", facts if data is None else (*facts, ("data", str(data))))


def attempted(call: Callable[[], Any], what: str) -> Any:
    """Return the result of somebody else's code, or say in one line what failed and where.

    Raises:
        ImportError: as it came.
        ValueError: in place of any other exception.
    """
    try:
        return call()
    except ImportError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{what} failed with {type(error).__name__}: {message} ({last.filename}:{last.lineno})") from error


def _module(target: str) -> ModuleType:
    """Import a module by its name, from the current folder too, or by its file."""
    _first_on_path(Path.cwd())
    if target.endswith(".py"):
        path = Path(target).resolve()
        if not path.is_file():
            raise ValueError(f"`model`: there is no file {target!r}.")
        _first_on_path(path.parent)
        name = f"{path.stem}_of_stepwell" if path.stem in sys.modules else path.stem  # a file may be called like a library
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        loader, module = specification.loader, importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses and pickling inside it look it up
        attempted(lambda: loader.exec_module(module), f"`model`: importing {target}")
        return module
    try:
        found = attempted(lambda: importlib.import_module(target), f"`model`: importing {target}")
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(f"{error.name}.")):
            raise ValueError(f"`model`: there is no module {target!r} here or among those installed. Write {FORM}.") from error
        raise
    assert isinstance(found, ModuleType)
    return found


def _first_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _arguments(name: str, function: Callable[..., Any], data: Path | None) -> list[Path]:
    """Return what the function is called with: the data if it takes an argument, else nothing."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind in kinds]
    needed = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if len(needed) > 1:
        raise ValueError(f"`model`: {name} must take at most one argument, the data: got {', '.join(needed)}.")
    if data is None and needed:
        raise ValueError(f"`data` must be given: got none, and {name} takes {needed[0]!r}.")
    if data is not None and not parameters:
        raise ValueError(f"`data` must not be given: got {str(data)!r}, and {name} takes no argument.")
    return [] if data is None else [data]


def _checked(name: str, given: object) -> tuple[nn.Module, BatchLoss, Iterable[Any]]:
    """Return (model, loss, batches), or say what came instead."""
    promise = f"`model`: {name} must return (model, loss, batches)"
    if not isinstance(given, tuple | list) or len(given) != 3:
        came = f"{type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__
        raise ValueError(f"{promise}: got {came}.")
    model, loss, batches = given
    if not isinstance(model, nn.Module):
        raise ValueError(f"{promise}, the first a torch module: got {type(model).__name__}.")
    if not callable(loss):
        raise ValueError(f"{promise}, the second a function `loss(model, batch)`: got {type(loss).__name__}.")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise ValueError(f"{promise}, the third an iterable of batches: got {type(batches).__name__}. Write [batch] for a single one.")
    return model, loss, batches
