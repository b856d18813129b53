"""GGUF: a transformers model of the Llama family as one file for llama.cpp, its encoded matrices as blocks of the same codes and scales.

What llama.cpp computes with is then what training saw, to the bit; its kernels round activations to 8 bits besides, see `verify`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepwell.activations import refuse_rounded
from stepwell.export import gguf_blocks, gguf_names
from stepwell.export.aside import new_file
from stepwell.export.deployed import check_encoded, owners
from stepwell.export.exported import Exported
from stepwell.export.extras import need
from stepwell.export.gguf_tokenizer import Tokenizer, read_tokenizer
from stepwell.quantizers import Encoded, check_weight

Floats = Literal["f32", "f16"]


class _Part(NamedTuple):
    """One tensor of the file: shape and dtype of its numbers or bytes, its block type, and a function that makes them."""

    shape: tuple[int, ...]
    dtype: Any
    type: str
    make: Callable[[], NDArray[Any]]


def gguf(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    floats: Floats = "f32",
    ternary: Literal["tq1_0", "tq2_0"] = "tq2_0",
    weights: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write a transformers model as a GGUF file in which the encoded matrices keep their codes and scales, bit for bit.

    Every encoded matrix takes the block type that holds its grid: Q4_0, Q4_1, Q8_0, MXFP4, TQ1_0 or TQ2_0. Rows of Llama's query and key
    projections are reordered as llama.cpp wants them. Tensors are written one at a time. The model is left as it was.

    Args:
        model: a transformers model of type llama, qwen2, qwen3 or olmo2.
        encoded: encoded matrices by parameter name, on grids of `target("gguf:...")`.
        path: the `.gguf` file to write; an existing one is replaced only when the export succeeded.
        tokenizer: folder with a `tokenizer.json`; None writes a file without a vocabulary, which runs on token ids.
        floats: what matrices that are not encoded are stored in. Vectors are always "f32".
        ternary: block type of ternary matrices; "tq1_0" takes 1.7 bits per weight, "tq2_0" 2.1 and is faster.
        weights: tensors by parameter name that stand in for the model's own, read one at a time; for a model on the meta device.

    Returns:
        Which weights run on their codes.

    Raises:
        ModuleNotFoundError: the extra `export` is not installed.
        TypeError, ValueError: an architecture that GGUF or this export does not know, weights that do not fit the model, a grid that no
            block type holds, or a float tensor that is not finite.
        FileNotFoundError, IsADirectoryError: no place for the file.
    """
    need("gguf", "transformers", extra="export")
    import gguf as library

    path = Path(path)
    _check_choices(floats, ternary)
    check_encoded(model, encoded)
    refuse_rounded(model, "GGUF")
    if not encoded:
        raise ValueError("`encoded` must hold at least one weight: got an empty mapping. Was anything selected?")
    vocabulary = None if tokenizer is None else read_tokenizer(Path(tokenizer))
    first = {id(parameter): name for name, parameter in reversed(owners(model).items())}
    known = {first[id(parameter)]: parameter for parameter in owners(model).values()}
    aliases = {first[id(owners(model)[name])]: name for name in encoded}
    config = getattr(model, "config", None)
    places = gguf_names.names(config, list(known))
    kinds = {name: _choose(encoded, alias, ternary.upper()) for name, alias in aliases.items()}
    parts = {
        places.files[name]: _blocks(encoded, aliases[name], tuple(parameter.shape), kinds[name], places.heads.get(name, 0))
        if name in kinds
        else _floats(name, parameter, weights or {}, places.heads.get(name, 0), floats)
        for name, parameter in known.items()
    }
    factors = gguf_names.rope_factors(config, _frequencies(model))
    if factors is not None:
        parts["rope_freqs.weight"] = _Part(tuple(factors.shape), np.dtype(np.float32), "F32", factors.numpy)
    with new_file(path) as aside:
        writer = library.GGUFWriter(aside, library.MODEL_ARCH_NAMES[getattr(library.MODEL_ARCH, places.architecture)])
        try:
            writer.add_file_type(_file_type(kinds))
            gguf_names.describe(writer, config)
            _vocabulary(writer, vocabulary)
            _write(writer, parts)
        finally:
            writer.close()
    return Exported(path, dict.fromkeys(encoded, 1), {})


def _check_choices(floats: str, ternary: str) -> None:
    """Refuse a dtype or a block type that is not offered."""
    if floats not in ("f32", "f16"):
        raise ValueError(f"`floats` must be 'f32' or 'f16': got {floats!r}.")
    if ternary not in ("tq1_0", "tq2_0"):
        raise ValueError(f"`ternary` must be 'tq1_0' or 'tq2_0': got {ternary!r}.")


def _choose(encoded: Mapping[str, Encoded], name: str, ternary: str) -> gguf_blocks.Kind:
    """Return the block type of one weight; an error names the weight."""
    try:
        return gguf_blocks.choose(encoded[name], ternary=ternary)
    except ValueError as error:
        raise ValueError(f"`encoded` holds {name!r}, which cannot be exported. {error}") from error


def _blocks(encoded: Mapping[str, Encoded], name: str, shape: tuple[int, ...], kind: gguf_blocks.Kind, heads: int) -> _Part:
    """Return an encoded matrix as a part."""
    rows, columns = shape

    def make() -> NDArray[Any]:
        weight = encoded[name]
        if heads:
            zeros = None if weight.zero_points is None else gguf_names.interleave(weight.zero_points, heads)
            codes, scales = (gguf_names.interleave(part, heads) for part in (weight.codes, weight.scales))
            weight = weight._replace(codes=codes, scales=scales, zero_points=zeros)
        return gguf_blocks.pack(weight, kind)

    return _Part((rows, columns // kind.block * kind.bytes), np.dtype(np.uint8), kind.name, make)


def _floats(name: str, parameter: Tensor, weights: Mapping[str, Tensor], heads: int, floats: Floats) -> _Part:
    """Return a tensor that is not encoded as a part; vectors are float32, which llama.cpp's kernels for them want."""
    half = floats == "f16" and parameter.ndim > 1
    dtype = np.dtype(np.float16 if half else np.float32)

    def make() -> NDArray[Any]:
        tensor = weights.get(name, parameter).detach()
        if tensor.is_meta or tuple(tensor.shape) != tuple(parameter.shape):
            raise ValueError(f"`weights` must hold {name!r} of shape {tuple(parameter.shape)}: got {tensor.device} {tuple(tensor.shape)}.")
        check_weight(tensor, name)
        with np.errstate(over="ignore"):
            values: NDArray[Any] = (gguf_names.interleave(tensor, heads) if heads else tensor).cpu().float().numpy().astype(dtype)
        if not np.isfinite(values).all():
            raise ValueError(
                f"`floats`='f16' overflows beyond 65504 in {name!r}, whose largest weight is {tensor.abs().max():g}. Use 'f32'."
            )
        return values

    return _Part(tuple(parameter.shape), dtype, "F16" if half else "F32", make)


def _frequencies(model: nn.Module) -> Tensor | None:
    """Return the inverse frequencies of a model's rotary embedding, where it has one."""
    return next((buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)


def _file_type(kinds: Mapping[str, gguf_blocks.Kind]) -> int:
    """Return ggml's number for what most matrices of the file are."""
    import gguf as library

    names = [kind.name for kind in kinds.values()]
    most = max(dict.fromkeys(names), key=names.count)
    return int(library.LlamaFileType["MOSTLY_MXFP4_MOE" if most == "MXFP4" else f"MOSTLY_{most}"])


def _vocabulary(writer: Any, vocabulary: Tokenizer | None) -> None:
    """Write the tokenizer, or that there is none."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)


def _write(writer: Any, parts: Mapping[str, _Part]) -> None:
    """Write the header, then the tensors one at a time."""
    import gguf as library

    for name, part in parts.items():
        size = int(np.prod(part.shape)) * part.dtype.itemsize
        kind = None if part.dtype != np.uint8 else library.GGMLQuantizationType[part.type]
        writer.add_tensor_info(name, part.shape, part.dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts.values():
        with torch.no_grad():
            writer.write_tensor_data(part.make())
