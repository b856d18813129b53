"""Hugging Face folders: config, weights in shards of safetensors, tokenizer; written tensor by tensor, and loaded back as a user would."""

import copy
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.activations import refuse_rounded
from stepwell.export.aside import new_folder
from stepwell.export.deployed import owners
from stepwell.export.trace import quiet, reason
from stepwell.quantizers import Encoded, Quantizer, check_weight

SHARD = 1 << 29  # bytes of weights per file: what is in memory beside the model while it is written
METADATA = "stepwell"  # key of the export's own description in the weights' header
INDEX = "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
Make = Callable[[], Mapping[str, Tensor]]


def check_model(model: nn.Module, target: str) -> None:
    """Refuse a model that transformers could not load again.

    Raises:
        ValueError: no transformers model, one whose files have other names than its parameters, or one with rounded activations.
    """
    refuse_rounded(model, target)
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` must be a transformers model for {target}, which ships a folder with its config: got {type(model).__name__}. "
            "Targets for any model: onnx:matmulnbits, onnx:qdq, safetensors."
        )
    if get_model_conversion_mapping(model, add_legacy=False):
        raise ValueError(
            f"`model`: {type(model).__name__} is stored under other names than its parameters have, which {target} does not know."
        )


def linear_weights(model: nn.Module, encoded: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Sort encoded weights into those of Linear layers, module -> name, and the others, name -> why they stay values in float."""
    parameters, taken, floats = owners(model), {}, {}
    for name in encoded:
        users = [(path, module) for path, module in _users(model, parameters[name])]
        odd = next((type(module).__name__ for _, module in users if type(module) is not nn.Linear), None)
        if odd is not None or parameters[name].ndim != 2:
            floats[name] = f"weight of {odd or 'a Linear'}: only those of plain Linear layers are held in codes"
        else:
            taken[users[0][0]] = name
    return taken, floats


def entries(
    model: nn.Module, encoded: Mapping[str, Encoded], packed: Mapping[str, Make], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Make]]:
    """Yield name and maker of everything that is stored, in the model's order, every tied tensor once.

    Args:
        model: whose parameters and persistent buffers are stored.
        encoded: weights that are stored as values on their grid where `packed` does not hold them.
        packed: parameter name -> maker of the tensors that hold its codes.
        weights: tensors that stand in for the model's own.
    """
    seen: set[int] = set()
    aliases = {id(owners(model)[name]): name for name in encoded}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        alias = aliases.get(id(tensor), name)
        if alias in packed:
            yield name, packed[alias]
        elif alias in encoded:
            yield name, lambda name=name, alias=alias: {name: encoded[alias].decode().float()}  # type: ignore[misc]
        else:
            yield name, lambda name=name, tensor=tensor: {name: _plain(name, tensor, weights)}  # type: ignore[misc]


def write_folder(
    model: nn.Module, folder: Path, stored: Iterator[tuple[str, Make]], *, config: Mapping[str, Any], dtype: torch.dtype,
    metadata: Callable[[list[str]], dict[str, str]], tokenizer: str | Path | None,
) -> None:  # fmt: skip
    """Write a folder that `from_pretrained` loads.

    Args:
        model: a transformers model; its config and generation config are written.
        folder: new, empty, or an earlier export.
        stored: what to store.
        config: the `quantization_config`.
        dtype: what the model is run in by default.
        metadata: tensor names of a file -> its header's metadata.
        tokenizer: folder with the tokenizer's files, or None.
    """
    source = None if tokenizer is None else Path(tokenizer)
    if source is not None and not any((source / name).is_file() for name in _TOKENIZER):
        raise ValueError(f"`tokenizer`: {source} holds none of {', '.join(_TOKENIZER[:4])}. Give the tokenizer's folder, or leave it out.")
    settings = copy.deepcopy(model.config)
    settings.architectures, settings.dtype, settings.quantization_config = [type(model).__name__], dtype, dict(config)  # type: ignore[union-attr]
    with new_folder(folder, ours=is_ours) as aside, quiet():
        _write_shards(aside, stored, metadata)
        settings.save_pretrained(aside)  # type: ignore[operator, union-attr]
        if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(aside)  # type: ignore[operator, union-attr]
        for name in _TOKENIZER:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, aside / name)


def load_folder(model: nn.Module, folder: Path) -> nn.Module:
    """Load a folder into a new model of the same class, as a user would: in the dtype that its config names.

    Raises:
        ValueError: transformers does not load it.
    """
    try:
        with quiet_loading():
            loaded: nn.Module = type(model).from_pretrained(folder, local_files_only=True, use_safetensors=True)  # type: ignore[attr-defined]
    except Exception as error:  # transformers and its quantizers raise whatever their parts raise
        raise ValueError(f"`path`: transformers does not load {folder}: {reason(error)}") from error
    return loaded.eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the progress bars of transformers and of the libraries below it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet(), redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_ours(folder: Path) -> bool:
    """Say whether an export of ours wrote the weights of a folder."""
    files = sorted(folder.glob("model*.safetensors"))
    try:
        with safe_open(files[0], framework="pt") as file:
            return METADATA in (file.metadata() or {})
    except (IndexError, SafetensorError, OSError):
        return False


def describe(grids: Mapping[str, Quantizer], floats: Mapping[str, str]) -> str:
    """Return what the header says of the weights: grids by name, and why some are float."""
    return json.dumps({"version": 1, "grids": {name: str(grid) for name, grid in grids.items()}, "floats": dict(floats)})


def read_floats(folder: Path) -> dict[str, str]:
    """Return which encoded weights an export left as float values, and why."""
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get(METADATA)
            return dict(json.loads(told)["floats"]) if told else {}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`path`: {path} describes itself in a way that cannot be read ({error!r}).") from error
    return {}


def _users(model: nn.Module, parameter: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of everything that holds a parameter."""
    for path, module in model.named_modules(remove_duplicate=False):
        if any(own is parameter for own in module._parameters.values()):
            yield path, module


def _plain(name: str, tensor: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor that is not encoded, finite and in the model's own dtype."""
    found = weights.get(name, tensor).detach()
    if found.is_meta or tuple(found.shape) != tuple(tensor.shape):
        raise ValueError(f"`weights` must hold {name!r} of shape {tuple(tensor.shape)}: got {found.device} {tuple(found.shape)}.")
    if found.is_floating_point():
        check_weight(found, name)
    return found.cpu()


def _write_shards(folder: Path, stored: Iterator[tuple[str, Make]], metadata: Callable[[list[str]], dict[str, str]]) -> None:
    """Write tensors into files of at most SHARD bytes, with an index where there is more than one."""
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(waiting, folder / f"{len(shards)}.part", metadata(list(waiting)))
        shards.append(list(waiting))
        waiting.clear()

    for _, make in stored:
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        size = sum(tensor.nbytes for tensor in made.values())
        if waiting and size + sum(tensor.nbytes for tensor in waiting.values()) > SHARD:
            flush()
        waiting.update(made)
        total += size
    flush()
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
        (folder / file).chmod(0o644)  # safetensors makes files that only their owner can read
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))
