"""Tokenizer: the files beside a model's weights that a server of it needs, copied unchanged."""

import shutil
from pathlib import Path

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what is there and was not written yet; return the names."""
    names = [name for name in FILES if (source / name).is_file() and not (target / name).exists()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
