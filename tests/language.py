"""The smallest language model that the tests train: 30 thousand weights, 28 tokens of length, a step in milliseconds."""

from dataclasses import replace

import torch

from stepwell.recipes import lm
from stepwell.train.language import build
from stepwell.train.ranks import here
from stepwell.train.recipe import Architecture
from stepwell.train.session import begin
from stepwell.train.tokenized import Wanted, prepare
from stepwell.train.tokens import open_tokens

SMALL = Architecture("llama", width=32, layers=2, heads=2, hidden=64, vocabulary=300, tied=True)
WORDS = ("stair", "basin", "grid", "step", "well", "loss", "code", "scale", "latent", "round")
TEXTS = [" ".join(WORDS[(i * i + 3 * j + j * j // 7) % 10] for j in range(40 + i % 11)) for i in range(60)]


def tiny(name="int4_1m_both", **changes):
    """A recipe of the table with a model and a budget for tests; `int4_1m_both` has latent weights and a penalty."""
    small = {"architecture": SMALL, "steps": 8, "warmup": 2, "rows": 6, "length": 16, "micro": 6}
    rare = {"save_every": 3, "evaluate_every": 4, "evaluate_rows": 9, "draws": 2}
    return replace(getattr(lm, name)(), **{"name": "tiny", **small, **rare, **changes})


def text_folder(folder):
    """Write the texts as files and return the folder's name, as a user gives it."""
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text + "\n")
    return str(folder)


def tokens_in(folder, *, texts=60):
    """Return the tokens of so many of the texts, from the last on."""
    prepare(lambda: iter(TEXTS[-texts:]), folder / "data", wanted=Wanted(10**9, 10**9), vocabulary=SMALL.vocabulary)
    return open_tokens(folder / "data")


def session_of(recipe, tokens, *, dtype=torch.float32, ranks=None):
    """Return a fresh session on the CPU, of this process alone unless told."""
    model = build(recipe.architecture, length=recipe.length, seed=recipe.seed).to(dtype)
    return begin(recipe, model, tokens, here("cpu") if ranks is None else ranks)
