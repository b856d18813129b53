"""Targets: what each family of runtimes is shipped as: who writes it, into which file, and how it is served. One row each.

The grids that a target holds are in `stepwell.runtimes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stepwell.formats import TERNARY
from stepwell.quantizers import Encoded, Quantizer
from stepwell.runtimes import target as grid_of
from stepwell.runtimes import targets
from stepwell.ship.source import Source, logits_only
from stepwell.ship.tensor_file import write_encoded, write_tensors
from stepwell.ship.tokenizer import copy_tokenizer

FAMILIES = ("compressed-tensors", "torchao")  # whose name alone stands for their integers of `bits`
ENCODED, REST = "encoded.safetensors", "rest.safetensors"
NOT_RUN = (
    "llama.cpp was not run: its kernels round activations to 8 bits besides, which moves the outputs a little. Where llama-cpp-python is "
    "installed, `stepwell verify` runs it and says by how much."
)
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
        activations: whether its files can say that activations are rounded.
        streams: whether it can be written and read again tensor by tensor, from a model without memory.
    """

    family: str
    file: str
    write: Write
    serve: str
    folders: bool = False
    matrices: bool = True
    folder: bool = False
    streams: bool = False
    activations: bool = False


def _onnx_matmulnbits(source: Source, encoded: Weights, path: Path) -> Written:
    """Write MatMulNBits operators; inputs of language models stay open along the sequence."""
    from stepwell.export.onnx import onnx

    with logits_only(source):
        return Written(onnx(source.model, encoded, source.example, path, sequence=None if source.checkpoint is None else 1).floats)


def _onnx_qdq(source: Source, encoded: Weights, path: Path) -> Written:
    """Write DequantizeLinear in front of every product; it holds convolutions as well."""
    from stepwell.export.onnx import onnx_qdq

    with logits_only(source):
        return Written(onnx_qdq(source.model, encoded, source.example, path, sequence=None if source.checkpoint is None else 1).floats)


def _compressed_tensors(source: Source, encoded: Weights, path: Path) -> Written:
    """Write a folder that transformers and vLLM load, tokenizer included."""
    from stepwell.export.compressed_tensors import compressed_tensors

    written = Written(compressed_tensors(source.model, encoded, path, weights=source.weights).floats)
    return _with_tokenizer(source, path, written)


def _torchao(source: Source, encoded: Weights, path: Path) -> Written:
    """Write a folder of torchao tensors that transformers loads, tokenizer included."""
    from stepwell.export.torchao import torchao

    return _with_tokenizer(source, path, Written(torchao(source.model, encoded, path).floats))


def _with_tokenizer(source: Source, path: Path, written: Written) -> Written:
    """Copy the tokenizer into a model's folder."""
    assert source.checkpoint is not None
    copy_tokenizer(source.checkpoint.folder, path)
    return written


def _gguf(source: Source, encoded: Weights, path: Path, *, ternary: Literal["tq1_0", "tq2_0"] = "tq2_0") -> Written:
    """Write a GGUF file, with the tokenizer where llama.cpp knows it; ternary weights as blocks of that type."""
    from stepwell.export import llama_cpp
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
    if not llama_cpp.available():
        notes += (NOT_RUN,)
    exported = gguf(source.model, encoded, path, tokenizer=folder, ternary=ternary, weights=source.weights)
    return Written(exported.floats, notes)


def _safetensors(source: Source, encoded: Weights, path: Path) -> Written:
    """Write codes and scales, and beside them every tensor else, in the dtype of the checkpoint where nothing is lost."""
    write_encoded(path, ((name, encoded[name]) for name in encoded), names=list(encoded))
    rest: Mapping[str, Tensor]
    if source.weights is not None:
        rest = source.weights
        names = [name for name in rest if name not in encoded]
    else:
        quantized = {id(parameter) for name, parameter in source.model.named_parameters(remove_duplicate=False) if name in encoded}
        rest = source.model.state_dict(keep_vars=True)
        names = [name for name, value in rest.items() if id(value) not in quantized]
    write_tensors(path.with_name(REST), ((name, _narrow(source, name, rest[name])) for name in names), names=names)
    return Written({})


_ONNX = """import onnxruntime
session = onnxruntime.InferenceSession("{path}", providers=["CPUExecutionProvider"])
outputs = session.run(None, {{session.get_inputs()[0].name: inputs}})"""
_QDQ = """import onnxruntime
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else activations are rounded to 8 bits
session = onnxruntime.InferenceSession("{path}", options, providers=["CPUExecutionProvider"])
outputs = session.run(None, {{session.get_inputs()[0].name: inputs}})"""
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")"""
_OURS = """import stepwell as sw
encoded = sw.load("{path}")  # name -> codes and scales; the other tensors are in rest.safetensors beside it
weights = {{name: one.decode() for name, one in encoded.items()}}"""

ROUTES = {
    row.family: row
    for row in (
        Route("onnx:matmulnbits", "model.onnx", _onnx_matmulnbits, _ONNX, activations=True),
        Route("onnx:qdq", "model.onnx", _onnx_qdq, _QDQ, matrices=False, activations=True),
        Route("compressed-tensors", "model", _compressed_tensors, "vllm serve {path}", folders=True, folder=True, streams=True),
        Route("torchao", "model", _torchao, _TRANSFORMERS, folders=True, folder=True),
        Route("gguf", "model.gguf", _gguf, "llama-server -m {path}", folders=True, streams=True),
        Route("safetensors", ENCODED, _safetensors, _OURS, matrices=False, streams=True),
    )
}
# the same codes in smaller blocks: the grid does not tell the two types apart
ROUTES["gguf:tq1_0"] = replace(ROUTES["gguf"], write=partial(_gguf, ternary="tq1_0"))


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
    rows = [row.name for row in targets() if row.name in ROUTES or row.name.partition(":")[0] in ROUTES]
    return [*(family for family in ROUTES if family in FAMILIES), *rows]


def grid(target: str, *, bits: int | None, block: int | None) -> Quantizer:
    """Return a target's grid.

    Raises:
        ValueError: an unknown target, or bits or a block that it does not have; says which targets do.
    """
    if target not in known():
        raise ValueError(f"`target` must be one of {', '.join(known())}: got {target!r}.")
    return grid_of(target, bits=bits, block=block)


def widths(target: str, *, block: int | None) -> list[Quantizer]:
    """Return the integer grids of a target's family, from which every layer can take its own.

    Raises:
        ValueError: there is but one.
    """
    family = route(target).family
    rows = [row for row in targets() if row.name.partition(":")[0] == family or row.name == family]
    integers = [row for row in rows if row.quantizer.format.levels in ("full", "symmetric") and row.quantizer.format != TERNARY]
    grids = [grid_of(row.name, bits=bits, block=block) for row in integers for bits in row.bits]
    if len(grids) < 2:
        raise ValueError(f"`target`: {target} holds {len(grids)} integer grid, and mixed bits need two. Try safetensors or onnx:qdq.")
    return sorted(grids, key=lambda grid: grid.format.bits)


def _narrow(source: Source, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that the checkpoint has it in, where it is still the same number for number."""
    stored = None if source.checkpoint is None else source.checkpoint.tensors.get(name)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored.dtype) if stored else None
    if dtype is None or not tensor.is_floating_point():
        return tensor.detach()
    small = tensor.detach().to(dtype)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor.detach()
