"""Targets: what each family of runtimes is shipped as: who writes it, into which file, and how it is served. One row each.

The grids that a target holds are in `stepwell.runtimes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepwell.quantizers import Encoded, Quantizer
from stepwell.runtimes import target as grid_of
from stepwell.runtimes import targets
from stepwell.ship.source import Source, logits_only
from stepwell.ship.tensor_file import write_encoded, write_tensors

ENCODED, REST = "encoded.safetensors", "rest.safetensors"
Weights = Mapping[str, Encoded]


@dataclass(frozen=True)
class Written:
    """What an export says: weights that are in float after all, with the reason, and what else a user should know."""

    floats: dict[str, str]
    notes: tuple[str, ...] = ()


Write = Callable[[Source, Weights, Path], Written]


@dataclass(frozen=True)
class Route:
    """How one family of targets is shipped.

    Attributes:
        family: what their names begin with.
        file: what is served, inside the artifact's folder.
        write: writes it.
        serve: the command or the lines that serve it; `{path}` stands for what is served.
        folders: whether the model must come from a Hugging Face folder.
        matrices: whether it holds quantized weights of two dimensions only.
        folder: whether what is served is a folder.
    """

    family: str
    file: str
    write: Write
    serve: str
    folders: bool = False
    matrices: bool = True
    folder: bool = False


def _onnx_matmulnbits(source: Source, encoded: Weights, path: Path) -> Written:
    """Write MatMulNBits operators; inputs of language models stay open along the sequence."""
    from stepwell.export.onnx import onnx

    with logits_only(source):
        return Written(onnx(source.model, encoded, source.example, path, sequence=None if source.checkpoint is None else 1).floats)


def _gguf(source: Source, encoded: Weights, path: Path) -> Written:
    """Write a GGUF file, with the tokenizer where llama.cpp knows it."""
    from stepwell.export.gguf import gguf
    from stepwell.export.gguf_tokenizer import read_tokenizer

    assert source.checkpoint is not None
    folder: Path | None = source.checkpoint.folder
    notes: tuple[str, ...] = ()
    try:
        assert folder is not None
        read_tokenizer(folder)
    except ValueError as error:
        folder, notes = None, (f"The file has no vocabulary and runs on token ids: {error}",)
    return Written(gguf(source.model, encoded, path, tokenizer=folder).floats, notes)


def _safetensors(source: Source, encoded: Weights, path: Path) -> Written:
    """Write codes and scales, and beside them every tensor else, in the dtype of the checkpoint where nothing is lost."""
    write_encoded(path, ((name, encoded[name]) for name in encoded), names=list(encoded))
    quantized = {id(parameter) for name, parameter in source.model.named_parameters(remove_duplicate=False) if name in encoded}
    rest = {name: value for name, value in source.model.state_dict(keep_vars=True).items() if id(value) not in quantized}
    write_tensors(path.with_name(REST), ((name, _narrow(source, name, value)) for name, value in rest.items()), names=list(rest))
    return Written({})


_ONNX = """import onnxruntime
session = onnxruntime.InferenceSession("{path}", providers=["CPUExecutionProvider"])
outputs = session.run(None, {{session.get_inputs()[0].name: inputs}})"""
_OURS = """import stepwell as sw
encoded = sw.load("{path}")  # name -> codes and scales; the other tensors are in rest.safetensors beside it
weights = {{name: one.decode() for name, one in encoded.items()}}"""

ROUTES = {
    row.family: row
    for row in (
        Route("onnx:matmulnbits", "model.onnx", _onnx_matmulnbits, _ONNX),
        Route("gguf", "model.gguf", _gguf, "llama-server -m {path}", folders=True),
        Route("safetensors", ENCODED, _safetensors, _OURS, matrices=False),
    )
}


def route(target: str) -> Route:
    """Return how a target is shipped.

    Raises:
        ValueError: an unknown target; lists those that are known.
    """
    family = target if target in ROUTES else target.partition(":")[0]
    if family not in ROUTES:
        raise ValueError(f"`target` must be one of {', '.join(known())}: got {target!r}.")
    return ROUTES[family]


def known() -> list[str]:
    """Return the names of all targets that can be shipped."""
    families = [family for family in ROUTES if family not in {row.name for row in targets()}]
    return [*families, *(row.name for row in targets() if row.name in ROUTES or row.name.partition(":")[0] in ROUTES)]


def grid(target: str, *, bits: int | None, block: int | None) -> Quantizer:
    """Return a target's grid.

    Raises:
        ValueError: an unknown target, or bits or a block that it does not have; says which targets do.
    """
    route(target)
    return grid_of(target, bits=bits, block=block)


def _narrow(source: Source, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that the checkpoint has it in, where it is still the same number for number."""
    stored = None if source.checkpoint is None else source.checkpoint.tensors.get(name)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored.dtype) if stored else None
    if dtype is None or not tensor.is_floating_point():
        return tensor.detach()
    small = tensor.detach().to(dtype)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor.detach()
