"""GGUF tokenizer: a byte-level BPE `tokenizer.json` as llama.cpp holds it: tokens, their types, merges, and how text is cut before them.

llama.cpp knows cuts by name only. A cut is the regular expression of the file, so it is compared with those of the names; one that is not
among them is refused, because the runtime would cut text in another way than training did.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's token types
LARGEST = 1 << 28  # bytes of a tokenizer.json: those of the largest vocabularies take a few tens of millions
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}


class Tokenizer(NamedTuple):
    """What GGUF holds of a tokenizer.

    Attributes:
        pre: llama.cpp's name for how text is cut before merging.
        tokens: by id, in the byte alphabet of the file.
        types: of the tokens, llama.cpp's numbers.
        merges: "left right", in order.
        special: "bos", "eos", "unk", "pad" -> id, for those that are known.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json`, and `tokenizer_config.json` where it is there, of a folder.

    Raises:
        ValueError: no such file, no byte-level BPE, or a cut that llama.cpp has no name for.
    """
    content = _json(folder / "tokenizer.json")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"`tokenizer` must be a byte-level BPE tokenizer: got {model.get('type')!r} in {folder}. Leave it out.")
    try:
        ids = {token: int(number) for token, number in model["vocab"].items()}
        added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
        ids.update({token: int(entry["id"]) for token, entry in added.items()})
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(f"ids that are not 0 to {len(ids) - 1}")
        tokens = sorted(ids, key=ids.__getitem__)
        types = [NORMAL if token not in added else CONTROL if added[token].get("special") else USER_DEFINED for token in tokens]
        pre = _cut(content.get("pre_tokenizer") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`tokenizer`: {folder / 'tokenizer.json'} cannot be written to GGUF ({error}). Leave it out.") from error
    return Tokenizer(pre, tokens, types, merges, _special(folder, ids))


def _cut(steps: dict[str, Any]) -> str:
    """Return llama.cpp's name for a pre-tokenizer."""
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = parts[0].get("pattern", {}).get("Regex")
        if pattern in _CUTS:
            return _CUTS[pattern]
    raise ValueError(f"text is cut by {kinds} in a way that llama.cpp has no name for")


def _special(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """Return the ids of special tokens that `tokenizer_config.json` names."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in _json(path).items() if name in _SPECIAL}
    return {_SPECIAL[name]: ids[token] for name, token in named.items() if isinstance(token, str) and token in ids}


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file."""
    if not path.is_file():
        raise ValueError(f"`tokenizer`: no file {path}. Give the folder that holds it, or leave it out.")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"`tokenizer`: {path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`tokenizer`: {path} is no JSON ({str(error)[:200]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"`tokenizer`: {path} must hold an object: got {type(content).__name__}.")
    return content
