"""GGUF names: what llama.cpp calls the tensors of a transformers model, how it orders their rows, and what else it wants to know.

Source: `gguf`'s tensor name map; llama.cpp's conversion of Llama, whose rotary kernel pairs neighbouring rows of the query and key
projections where transformers pairs the halves of a head. Qwen and OLMo 2 use the halves in both.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAMILIES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "olmo2": "OLMO2"}  # model_type -> gguf's architecture
_INTERLEAVED = ("llama",)
_ROPES = ("default", "linear", "llama3")


class Names(NamedTuple):
    """Where the parameters of a model go.

    Attributes:
        architecture: `gguf`'s name of it, such as LLAMA.
        files: parameter name -> name in the file.
        heads: parameter name -> attention heads whose rows are reordered, for those that are.
    """

    architecture: str
    files: dict[str, str]
    heads: dict[str, int]


def names(config: Any, parameters: Collection[str]) -> Names:
    """Return the file's names of a model's parameters.

    Args:
        config: of a transformers model.
        parameters: all names of its state dict; those of tied heads left out.

    Raises:
        ValueError: an architecture, or a parameter of it, that has no name in GGUF or runs otherwise there.
    """
    import gguf

    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"`model` must be a transformers model of type {', '.join(FAMILIES)} for GGUF: got {kind or 'a model without a config'}. "
            "Targets for any model: onnx:matmulnbits, onnx:qdq, safetensors."
        )
    _refuse_variants(config, kind)
    architecture = FAMILIES[kind]
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), config.num_hidden_layers)
    files, heads, unknown = {}, {}, []
    for name in parameters:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            unknown.append(name)
            continue
        files[name] = found
        if kind in _INTERLEAVED and ".q_proj." in name:
            heads[name] = config.num_attention_heads
        elif kind in _INTERLEAVED and ".k_proj." in name:
            heads[name] = config.num_key_value_heads
    if unknown:
        raise ValueError(f"`model` has parameters that {kind} does not have in GGUF: {', '.join(unknown[:4])}. Merge or remove adapters.")
    return Names(architecture, files, heads)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Return rows `(heads * size, ..)` with the halves of every head interleaved, as llama.cpp's rotary kernel wants them.

    >>> interleave(torch.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def separate(rows: Tensor, heads: int) -> Tensor:
    """Undo `interleave`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def describe(writer: Any, config: Any) -> None:
    """Write what the runtime must know of a model beside its weights, under llama.cpp's keys.

    Args:
        writer: a GGUFWriter.
        config: of the model.
    """
    import gguf

    size, rope = head_size(config), config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any, inverse_frequencies: Tensor | None) -> Tensor | None:
    """Return what divides the rotary frequencies where they are scaled one by one (Llama 3.1), `(head size / 2,)`; else None.

    Args:
        config: of the model.
        inverse_frequencies: of its rotary embedding, scaling included.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    if inverse_frequencies is None or inverse_frequencies.is_meta:
        raise ValueError("`model` must hold its rotary embedding's frequencies, which Llama 3.1's scaling needs: got a model without them.")
    size = head_size(config)
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / inverse_frequencies.double().cpu()).float()


def head_size(config: Any) -> int:
    """Return the length of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse_variants(config: Any, kind: str) -> None:
    """Refuse what llama.cpp would run as something else."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in _ROPES or rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"`model`: a rotary embedding of type {dict(rope)} is not exported to GGUF; known are {', '.join(_ROPES)}.")
    if getattr(config, "use_sliding_window", False):
        raise ValueError(f"`model`: {kind} with use_sliding_window=True is not exported to GGUF, which would attend to everything.")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"`model`: {kind} with hidden_act={config.hidden_act!r} is not exported to GGUF, which would compute silu.")
