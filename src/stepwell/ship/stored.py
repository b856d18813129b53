"""Stored: the tensors of a model as an artifact holds them, by the model's own names, decoded to float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepwell.selection import Selection, select
from stepwell.ship.checkpoint import headers, readable, refuse_pickle
from stepwell.ship.contents import FORMS, damaged
from stepwell.ship.source import Source
from stepwell.ship.targets import REST
from stepwell.storage import load_each

GGUF_FLOATS = ("F32", "F16", "BF16", "F64")


class Found(NamedTuple):
    """What an artifact holds: tensors by parameter name, and the names of those that are quantized in it."""

    tensors: dict[str, Tensor]
    quantized: set[str]


def stored(path: Path, source: Source) -> Found:
    """Read the tensors of an artifact that the source's model has a place for.

    Raises:
        ModuleNotFoundError: an extra is not installed.
        ValueError: a pickle, something that cannot be read, or an artifact without a quantized weight of this model.
    """
    refuse_pickle(path, "artifact")
    readers = {".onnx": _onnx, ".gguf": _gguf, ".safetensors": _ours}
    if not path.is_dir() and path.suffix not in readers:
        raise ValueError(f"`artifact` must be {FORMS}: got {path}{'' if path.exists() else ', which is not there'}.")
    with damaged(path):
        entries = list((_folder if path.is_dir() else readers[path.suffix])(path, source))
    shapes = {name: tuple(tensor.shape) for name, tensor in source.model.state_dict(keep_vars=True).items()}
    kept = [(name, tensor, coded) for name, tensor, coded in entries if shapes.get(name) == tuple(tensor.shape)]
    quantized = {name for name, _, coded in kept if coded}
    if not quantized:
        raise ValueError(f"`artifact`: {path} holds no quantized weight of {source.name}: it was made from another model, or is in float.")
    return Found({name: tensor for name, tensor, _ in kept}, quantized)


Entries = Iterator[tuple[str, Tensor, bool]]


def _onnx(path: Path, source: Source) -> Entries:
    """Read an ONNX file's nodes by the parameters that they are named after, and its other constants."""
    from stepwell.export import onnx_file

    file = onnx_file.read(path)
    parameters = dict(source.model.named_parameters(remove_duplicate=False))
    choices: Selection[bool] = select(source.model)
    first = {row.name: row.axis == 0 for row in choices}
    whole: dict[str, Tensor] = {}
    for product in file.products:
        parameter, value = parameters.get(product.parameter), torch.from_numpy(product.held.decode())
        if parameter is None:
            continue
        rows = parameter.numel() // max(1, value.shape[1])
        into = whole.setdefault(product.parameter, torch.zeros(rows, value.shape[1]))
        into[slice(*(product.rows or (0, rows)))] = value
    for name, value in whole.items():
        yield name, (value.T if first.get(name) else value).reshape(parameters[name].shape), True
    for name, array in file.arrays.items():
        if name not in whole:
            yield name, torch.from_numpy(array.copy()), False


def _gguf(path: Path, source: Source) -> Entries:
    """Read a GGUF file, rows back in the model's order."""
    from stepwell.export import gguf_file, gguf_names

    file = gguf_file.read(path)
    places = gguf_names.names(getattr(source.model, "config", None), [name for name, _ in source.model.named_parameters()])
    for name, place in places.files.items():
        if (one := file.tensors.get(place)) is not None:
            value = torch.from_numpy(gguf_file.values(one).copy())
            yield name, gguf_names.separate(value, places.heads[name]) if name in places.heads else value, one.type not in GGUF_FLOATS


def _ours(path: Path, source: Source) -> Entries:
    """Read codes and scales, and the other tensors beside them."""
    del source
    for name, weight in load_each(path):
        yield name, weight.decode().float(), True
    rest = path.with_name(REST)
    if rest.is_file():
        names = list(headers(rest))
        with readable(rest) as opened:
            for name in names:
                yield name, opened.get_tensor(name), False


def _folder(path: Path, source: Source) -> Entries:
    """Let transformers load a folder, and read what its modules then hold."""
    from stepwell.export.hf_folder import check_model, load_folder, quiet_loading

    check_model(source.model, "a folder")
    loaded: Any = load_folder(source.model, path)
    coded = {f"{name}.weight" for name, module in loaded.named_modules() if getattr(module, "quantization_scheme", None) is not None}
    if coded:
        with quiet_loading(), torch.no_grad():
            loaded(*source.example)  # the first forward pass decompresses the weights
    for name, tensor in loaded.state_dict(keep_vars=True).items():
        theirs = hasattr(tensor, "qdata")
        yield name, (tensor.dequantize() if theirs else tensor).detach().float(), theirs or name in coded


def put(model: nn.Module, found: Found) -> None:
    """Let a model hold what an artifact holds."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in found.tensors.items():
            state[name].copy_(tensor)
