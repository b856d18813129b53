"""Language: a causal language model from a Hugging Face folder and a text file, as model, loss and batches.

Weights are read from safetensors only, code from the folder is never run, and nothing is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepwell.explain.sources import Subject
from stepwell.export.extras import need, quiet

WINDOW, ROWS = 128, 4  # tokens of a row, rows of a batch
CHUNK = 1 << 16  # characters that are tokenized at once
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


def from_folder(
    folder: Path, data: Path | None, *, limit: int, window: int | None = None, tensors: Mapping[str, Any] | None = None
) -> Subject:
    """Load a language model and cut a text into batches for it.

    Args:
        folder: config.json, safetensors and a tokenizer.
        data: UTF-8 text that the model was not trained on; its beginning is used.
        limit: most batches to cut.
        window: tokens of a row; 128, or what the model can read if that is less.
        tensors: as for `model_alone`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: something missing in the folder, weights that do not fill the model, a file that is no text or too short.
    """
    if data is None:
        raise ValueError(f"`data` must be a text file: got none. A language model such as {folder} is explained on text; give --data.")
    _check_text(data)
    _check_folder(folder)
    need("transformers", extra="hf")
    with quiet():
        model, tokenizer = _model(folder, tensors), _tokenizer(folder)
    longest = int(getattr(model.config, "max_position_embeddings", 0) or WINDOW)
    length = min(WINDOW, longest) if window is None else window
    if not 2 <= length <= longest:
        raise ValueError(f"`window` must be 2 to {longest} tokens, what the model can read: got {length}.")
    tokens = _tokens(tokenizer, data, limit * ROWS * length)
    if len(tokens) < ROWS * length:
        raise ValueError(
            f"`data` is too short: {data} holds {len(tokens)} tokens, and one batch of {ROWS} rows takes {ROWS * length}. "
            "Give a longer text or a smaller --window."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"`model`: the tokenizer gives token {int(tokens.max())}, the model knows {vocabulary}: they do not belong together."
        )
    batches = list(tokens[: len(tokens) // (ROWS * length) * ROWS * length].view(-1, ROWS, length))
    facts = (
        ("source", f"{folder} ({type(model).__name__})"),
        ("data", f"the first {len(batches) * ROWS * length} tokens of {data}"),
        ("batches", f"{len(batches)} of {ROWS} rows of {length} tokens"),
    )
    return Subject(str(folder), model, next_token_loss, batches, "nats per token", facts)


def model_alone(folder: Path, *, tensors: Mapping[str, Any] | None = None) -> Any:
    """Return a folder's causal language model in float32 and evaluation mode; no tokenizer and no text are needed.

    Args:
        folder: config.json and safetensors.
        tensors: the folder's tensors by name, each read when it is indexed, as safetensors' slices are. None lets transformers read them:
            it keeps every file mapped until the last tensor is read, half the model once more where it is stored in 16 bits.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: the folder cannot be loaded as one, or its weights do not fill the model.
    """
    need("transformers", extra="hf")
    with quiet():
        return _model(folder, tensors)


def like_the_folder(model: Any, folder: Path) -> Any:
    """Return a model, made without its folder, with what `from_pretrained` takes from there besides the weights: name, how it generates."""
    model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / GENERATION).is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
    return model


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of every next token, in nats; `tokens` is `(rows, length)`."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _check_text(data: Path) -> None:
    """Refuse a file that is missing, empty or no text, judged by its beginning."""
    if not data.is_file():
        raise ValueError(
            f"`data` must be a text file: got {str(data)!r}, which " + ("is a folder." if data.is_dir() else "does not exist.")
        )
    with data.open("rb") as file:
        head = file.read(CHUNK)
    if not head.strip():
        raise ValueError(f"`data` must hold text: {str(data)!r} is empty.")
    if b"\0" in head:
        raise ValueError(f"`data` must be text: got {str(data)!r}, which holds zero bytes, as binary files do.")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that lacks a part, before anything heavy is imported."""
    names = [path.name for path in folder.iterdir()]
    if "config.json" not in names:
        raise ValueError(f"`model`: the folder {folder} has no config.json, so it is no Hugging Face model.")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith(PICKLES))
        raise ValueError(
            f"`model`: the folder {folder} has no safetensors"
            + (
                f", only {', '.join(pickled[:3])}: pickles can run code and are never read. Save it again with safetensors."
                if pickled
                else "."
            )
        )
    if not any(name in names for name in TOKENIZERS):
        raise ValueError(f"`model`: the folder {folder} has no tokenizer (such as tokenizer.json). Save the tokenizer beside the model.")


def _model(folder: Path, tensors: Mapping[str, Any] | None) -> Any:
    """Return the model in float32 and evaluation mode."""
    try:
        model, told = _by_itself(folder) if tensors is None else _from_tensors(folder, tensors)
    except Exception as error:  # transformers raises whatever the file format, the config or the architecture meet
        raise ValueError(f"`model`: {folder} cannot be loaded as a causal language model: {_line(error)}") from error
    lacking = sorted([*told["missing_keys"], *(str(one) for one in told["mismatched_keys"])])
    if lacking:
        raise ValueError(f"`model`: the files in {folder} lack or misfit {len(lacking)} weights such as {lacking[0]}.")
    return model.eval()


def _by_itself(folder: Path) -> Any:
    """Return what transformers makes of a folder, and what it has to say of it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )


def _from_tensors(folder: Path, tensors: Mapping[str, Any]) -> Any:
    """Return the same from tensors that are given; names are mapped and weights joined as transformers does with its files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model, told = type(empty).from_pretrained(
        None, config=empty.config, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True
    )
    return like_the_folder(model, folder), told


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise ValueError(f"`model`: the tokenizer in {folder} cannot be loaded: {_line(error)}") from error


def _tokens(tokenizer: Any, data: Path, wanted: int) -> Tensor:
    """Return the first tokens of a text, `(count,)`, at most `wanted`."""
    found: list[int] = []
    try:
        with data.open(encoding="utf-8") as file:
            while len(found) < wanted and (text := file.read(CHUNK)):
                found += tokenizer.encode(text, add_special_tokens=False, verbose=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"`data` must be UTF-8 text: got {str(data)!r}, {error.reason} at byte {error.start} of a part.") from error
    return torch.tensor(found[:wanted], dtype=torch.int64)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
