"""Language models to train: built by transformers from a few counts, or read from a folder; and their loss.

Weights are float32 whatever the model computes in: bf16 is autocast's business, so that updates below its resolution are not lost.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepwell.export.extras import need, quiet
from stepwell.train.recipe import Architecture

SPREAD = 0.02  # standard deviation of the initial weights
ROTARY = 10_000.0  # base of the rotary positions


def build(architecture: Architecture, *, length: int, seed: int) -> nn.Module:
    """Return a decoder with fresh float32 weights; transformers' own class, so that its folder loads anywhere.

    Args:
        architecture: its counts.
        length: most tokens that it is made to read at once.
        seed: of the weights; the global random state is left as it was.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: a width that the heads do not divide.
    """
    if architecture.width % architecture.heads:
        raise ValueError(f"`heads` must divide `width`: got {architecture.heads} for {architecture.width}.")
    need("transformers", extra="hf")
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return _made(architecture, length)


def load_folder(folder: Path, *, length: int) -> nn.Module:
    """Return the model of a Hugging Face folder in float32; only safetensors are read, and code in the folder is never run.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: no model there, weights that do not fill it, or a model that reads fewer tokens at once than `length`.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"`start` must be a Hugging Face folder with config.json and safetensors, or an earlier run: got {folder}.")
    need("transformers", extra="hf")
    try:
        with quiet():
            model, told = _read(folder)
    except Exception as error:  # transformers raises whatever the file format, the config or the architecture meet
        raise ValueError(f"`start`: {folder} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    lacking = sorted([*told["missing_keys"], *(str(one) for one in told["mismatched_keys"])])
    if lacking:
        raise ValueError(f"`start`: the files in {folder} lack or misfit {len(lacking)} weights such as {lacking[0]}.")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ValueError(f"`start`: the model in {folder} reads {longest} tokens at once, the recipe's `length` is {length}.")
    model.config.use_cache = False
    fresh: nn.Module = model
    return fresh


def _read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder and what transformers says of its weights."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    return model, told


def _made(architecture: Architecture, length: int) -> nn.Module:
    """Return the model with weights from the global random state."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config

    kind = LlamaConfig if architecture.family == "llama" else Olmo2Config
    config = kind(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.width,
        intermediate_size=architecture.hidden,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=length,
        tie_word_embeddings=architecture.tied,
        initializer_range=SPREAD,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY},
        attention_bias=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens a model knows."""
    inner: Any = model
    return int(inner.get_input_embeddings().num_embeddings)


def row_losses(model: nn.Module, tokens: Tensor, precision: Literal["bf16", "fp32"]) -> Tensor:
    """Return the cross entropy of every row's next tokens, summed over the row, in nats, `(rows,)`.

    Args:
        model: from tokens to logits.
        tokens: `(rows, length + 1)` int64; the first `length` are read, each next one predicted.
        precision: "bf16" computes logits under autocast; the loss is float32 in any case.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).sum(1)
