"""Checkpoints: everything that a run goes on from, as safetensors with one JSON beside them; nothing is ever pickled or unpickled.

Tensors go through torch.distributed.checkpoint with its safetensors storage, so that a checkpoint loads at another world size:
`model.NAME`, and `optimizer.PARAMETER.KEY` for the optimizer's state with all that a Run adds to it. The JSON holds the step, every fact
that is no tensor, and the SHA-256 of every file. A checkpoint is written aside, forced to the disk and renamed: it is there whole, or not.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.optim import Optimizer

from stepwell.train.ranks import Ranks
from stepwell.train.tokens import sha256

FACTS = "checkpoint.json"
PREFIX = "step-"
VERSION = 1
KEPT = 2  # checkpoints: one more than the newest, should that be damaged later
MODEL, OPTIMIZER = "model.", "optimizer."


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


def save(root: Path, model: nn.Module, optimizer: Optimizer, *, step: int, facts: Mapping[str, Any], ranks: Ranks) -> Path:
    """Write a checkpoint, remove all but the last two, and return its folder. Every process calls it.

    Args:
        root: the folder of all checkpoints.
        model: its state is written as the forward pass sees it; latent weights are in the optimizer's.
        optimizer: with the Run's entries.
        step: optimizer steps done; the checkpoint's name.
        facts: what else the run needs to know of itself, as JSON.
        ranks: of this process.

    Raises:
        OSError: it cannot be written; the older ones are as they were.
    """
    state = flat(model, optimizer)
    final, aside = root / f"{PREFIX}{step:09d}", root / f".{PREFIX}{step:09d}.part"
    told = {"version": VERSION, "step": step, "world_size": ranks.size, **facts}
    try:
        ranks.alone(lambda: _make_room(aside))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=ranks.size > 1)
        with _quiet():
            write(state, storage_writer=writer, no_dist=ranks.size == 1)
        ranks.wait()
        ranks.alone(lambda: _finish(aside, final, told))
    except (OSError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} cannot be written to {root} ({_reason(error)}). The older ones there are whole; make room and "
            "start again with --resume."
        ) from error
    return final


def load(folder: Path, model: nn.Module, optimizer: Optimizer, *, ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint into a model and its optimizer, to which the Run is attached already, and return its facts.

    Raises:
        DamagedError: the folder is not what was written.
        ValueError: a checkpoint of another model or method: tensors that are missing or have another shape.
    """
    facts = verified(folder) if ranks.first else facts_of(folder)
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    parameters = dict(model.named_parameters())
    state = flat(model, optimizer)
    for key, told in stored.items():
        mine, name = state.get(key), key.removeprefix(OPTIMIZER).rpartition(".")[0]
        shape = tuple(told.size)  # type: ignore[union-attr]
        if mine is not None and tuple(mine.shape) != shape:
            raise ValueError(f"`{key}` of {folder} has shape {shape}, this run's {tuple(mine.shape)}: it is a checkpoint of another run.")
        dtype = told.properties.dtype  # type: ignore[union-attr]
        if mine is None and key.startswith(OPTIMIZER) and name in parameters:
            like = parameters[name]
            state[key] = torch.empty_like(like, dtype=dtype) if tuple(like.shape) == shape else torch.empty(shape, dtype=dtype)
        elif mine is not None:
            state[key] = torch.empty_like(mine, dtype=dtype)  # not the live tensor: a failed read leaves the run as it was
    missing = [key for key in state if key not in stored and key.startswith(MODEL)]
    unknown = [key for key in stored if key not in state]
    if missing or unknown:
        raise ValueError(
            f"{folder} is a checkpoint of another run: `{(missing or unknown)[0]}` is " + ("not there." if missing else "not this run's.")
        )
    state = {key: tensor for key, tensor in state.items() if key in stored}
    with _quiet():
        read(state, storage_reader=reader, no_dist=ranks.size == 1)
    _put(state, model, optimizer)
    return facts


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, or None where there is none, and what was wrong with newer ones.

    Raises:
        DamagedError: there are checkpoints, and none of them is whole.
    """
    refused: list[str] = []
    for folder in sorted(root.glob(f"{PREFIX}*"), reverse=True):
        try:
            verified(folder)
        except DamagedError as error:
            refused.append(str(error))
            continue
        return folder, refused
    if refused:
        raise DamagedError(f"no checkpoint in {root} is whole: {' '.join(refused)} Start the run again in another folder.")
    return None, []


def verified(folder: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint once every file is found to be what was written.

    Raises:
        DamagedError: a file that is missing, cut off or changed, by its name.
    """
    facts = facts_of(folder)
    for name, digest in facts["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"the checkpoint {folder} lacks {name}.")
        if sha256(path) != digest:
            raise DamagedError(f"the checkpoint {folder} is damaged: {name} is not what was written (its SHA-256 differs).")
    return facts


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint.

    Raises:
        DamagedError: no such file, or one that cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        complete = facts["version"] == VERSION and isinstance(facts["step"], int) and bool(facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"the checkpoint {folder} cannot be read: its {FACTS} is missing or damaged ({type(error).__name__})."
        ) from error
    if not complete:
        raise DamagedError(f"the checkpoint {folder} has layout version {facts['version']!r}, this stepwell reads {VERSION}.")
    return facts


def flat(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of a model and its optimizer as tensors by name.

    Raises:
        ValueError: something in the optimizer's state that is no tensor.
    """
    state = {f"{MODEL}{name}": tensor for name, tensor in _model_state(model).items()}
    for index, entry in optimizer.state_dict()["state"].items():
        name = _names(model, optimizer)[index]
        for key, value in entry.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"`{key}` in the optimizer's state of {name!r} is no tensor: got {type(value).__name__}. It cannot be saved."
                )
            state[f"{OPTIMIZER}{name}.{key}"] = value
    return state


def _put(state: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Load flat tensors: the model first, because latent weights go before what is written to parameters."""
    entries: dict[int, dict[str, Tensor]] = {}
    index = {name: number for number, name in enumerate(_names(model, optimizer))}
    for key, tensor in state.items():
        if key.startswith(OPTIMIZER):
            name, _, inner = key.removeprefix(OPTIMIZER).rpartition(".")
            entries.setdefault(index[name], {})[inner] = tensor
    model.load_state_dict({key.removeprefix(MODEL): tensor for key, tensor in state.items() if key.startswith(MODEL)}, strict=False)
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors, each shared one once: safetensors holds no aliases."""
    kept = dict((*model.named_parameters(), *model.named_buffers()))
    return {name: value.detach() for name, value in model.state_dict().items() if name in kept}


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in its own numbering."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _make_room(aside: Path) -> None:
    """Sweep away what processes that were killed have left, and make the folder to write into."""
    for left in aside.parent.glob(f".{PREFIX}*"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)


def _finish(aside: Path, final: Path, facts: dict[str, Any]) -> None:
    """Seal a checkpoint and give it its name; then remove all but the last ones up to it: later ones are of a course that was given up."""
    _seal(aside, facts)
    if final.exists():
        _discard(final)
    aside.rename(final)
    _to_disk(final.parent)
    found = sorted(final.parent.glob(f"{PREFIX}*"))
    kept = [folder for folder in found if folder <= final][-KEPT:]
    for old in found:
        if old not in kept:
            _discard(old)


def _discard(folder: Path) -> None:
    """Remove a checkpoint in such a way that no half of it is ever taken for one."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts with the digest of every file, and force all of it to the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    facts["sha256"] = {path.name: sha256(path) for path in files}
    (folder / FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for path in (*files, folder / FACTS, folder):
        _to_disk(path)


def _to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of files, before anything else happens."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Return the innermost reason in words: torch wraps what a file system said."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(inner).split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from saying that no process group is there, which we know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
