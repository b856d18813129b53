"""Tokenizers: read in the hub's format, or trained on the data as byte-level BPE; either way saved with the run."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stepwell.export.extras import need, quiet

END = "<|endoftext|>"
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # what tokenizers call the end of a document
BYTES = "bytes"  # as a name: no merges, 256 tokens and the end of a document
CHARACTERS, PER_TOKEN = 1 << 26, 1 << 12  # of the data that a tokenizer is trained on: at most, and for each of its tokens
LEAST = 257


def trained(texts: Iterable[str | None], vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer trained on the beginning of the data; the same data gives the same tokenizer.

    Args:
        texts: documents.
        vocabulary: most tokens, at least 257: the end of a document and one per byte.

    Raises:
        ModuleNotFoundError: tokenizers is not installed.
        ValueError: a smaller vocabulary.
    """
    if vocabulary < LEAST:
        raise ValueError(f"`vocabulary` of a byte-level tokenizer must be {LEAST} or more: got {vocabulary}.")
    need("tokenizers", extra="hf")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_beginning(texts, min(CHARACTERS, PER_TOKEN * vocabulary)), trainer)
    return tokenizer


def named(name: str, texts: Iterable[str | None], vocabulary: int) -> Any:
    """Return the tokenizer that a user names.

    Args:
        name: a folder with a tokenizer in the hub's format, a `tokenizer.json`, "bytes", or a name on the hub.
        texts, vocabulary: as in `trained`, for "bytes".

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: no tokenizer there, or one that is written in Python alone.
    """
    if name == BYTES:
        return trained((), min(vocabulary, LEAST))
    need("tokenizers", "transformers", extra="hf")
    from tokenizers import Tokenizer

    path = Path(name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else _from_hub(name, path.is_dir())
    except Exception as error:  # tokenizers raises bare exceptions, transformers whatever the hub and the files meet
        raise ValueError(
            f"`tokenizer`: {name!r} is no tokenizer that can be read ({type(error).__name__}: {' '.join(str(error).split())[:160]}). Give "
            f"a folder with tokenizer.json, that file, {BYTES!r}, or leave it out to have one trained on the data."
        ) from error


def end_of_document(tokenizer: Any) -> int | None:
    """Return the token that ends a document, or None where the tokenizer has none of the usual ones."""
    found = (tokenizer.token_to_id(word) for word in ENDS)
    return next((token for token in found if token is not None), None)


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer in the hub's format: `AutoTokenizer.from_pretrained` reads it back."""
    end = end_of_document(tokenizer)
    word = None if end is None else tokenizer.id_to_token(end)
    with quiet():
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word).save_pretrained(folder)


def _from_hub(name: str, local: bool) -> Any:
    """Return the backend of a tokenizer that transformers loads."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    if not getattr(loaded, "is_fast", False):
        raise ValueError(f"{type(loaded).__name__} is written in Python alone")
    return loaded.backend_tokenizer


def _beginning(texts: Iterable[str | None], wanted: int) -> Iterator[str]:
    """Yield documents until there are enough characters."""
    seen = 0
    for text in texts:
        if text:
            yield text
            seen += len(text)
        if seen >= wanted:
            return
