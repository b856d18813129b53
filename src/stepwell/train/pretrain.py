"""Pretrain: one recipe on one text, from nothing or from a model, to a folder with everything that comes of it.

    OUT/run.json        what was started: recipe, data, start
    OUT/data            the tokens, where the data was text
    OUT/checkpoints     the last two
    OUT/metrics.jsonl   a line per step
    OUT/model           the result (see `outcome`)

What a step does is a function of the recipe,
the tokens and the step alone, and a checkpoint holds the rest, so that a run that was killed ends on the weights of one that was not.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stepwell.train import checkpoint
from stepwell.train.blame import DivergedError
from stepwell.train.evaluation import evaluate
from stepwell.train.language import build, load_folder, vocabulary_of
from stepwell.train.metrics import Metrics, Tracker
from stepwell.train.ranks import Ranks, here
from stepwell.train.recipe import Recipe
from stepwell.train.session import Session, advance, begin
from stepwell.train.text import documents
from stepwell.train.tokenized import Wanted
from stepwell.train.tokenized import prepare as tokenize
from stepwell.train.tokens import INDEX, Tokens, open_tokens

RUN, DATA, CHECKPOINTS, MODEL = "run.json", "data", "checkpoints", "model"


class Seen(NamedTuple):
    """What a person is shown after a step: steps done, numbers by name (loss in nats per token), and words now and then."""

    step: int
    values: dict[str, float]
    words: str = ""


Watcher = Callable[[Seen], None]


def pretrain(
    recipe: Recipe,
    out: Path,
    *,
    data: str | None = None,
    tokenizer: str | None = None,
    start: Path | None = None,
    resume: bool = False,
    replicate: bool = False,
    track: Tracker | None = None,
    watch: Watcher = lambda seen: None,
) -> Session:
    """Train a language model to the end of its recipe, and return what trained; `outcome.finish` makes the rest of it.

    Args:
        recipe: the run.
        out: its folder.
        data: text or a dataset (see `text.documents`), or a folder of tokens that an earlier run made.
        tokenizer: see `tokenizer.named`; None takes that of the tokens or of `start`, or trains one.
        start: a Hugging Face folder, or the folder of an earlier run, to go on from.
        resume: go on with the run that `out` holds, from its newest whole checkpoint; from the beginning where there is none yet.
        replicate: with several processes, whole copies of the model in place of shards (see `ranks`); a checkpoint loads under either.
        track: where else the metrics go.
        watch: called after every step, and with words where something takes long.

    Raises:
        DivergedError: a loss or gradient that is not finite; the last checkpoint stays.
        OSError: a checkpoint that cannot be written; the older ones stay.
        ValueError: whatever does not fit: the folder, the data, the tokenizer, the start, the number of processes.
    """
    ranks = here(replicate=replicate)
    ranks.rows(recipe.rows)
    folder = _folder_of(start)
    told = {"recipe": recipe.described(), "data": data, "tokenizer": tokenizer, "start": None if start is None else str(start)}
    _check(recipe, out, told, resume=resume, start=start)
    with torch.random.fork_rng():
        model = (
            build(recipe.architecture, length=recipe.length, seed=recipe.seed)
            if folder is None
            else load_folder(folder, length=recipe.length)
        )
        if tokenizer is None and folder is not None:
            tokenizer = str(folder)
        tokens = _tokens(recipe, out, data, tokenizer, vocabulary_of(model), ranks, watch)
        if ranks.first:
            _write_json(out / RUN, told)
        session = begin(recipe, model, tokens, ranks)
        done = _resumed(session, out, watch) if resume else 0
        metrics = Metrics(out, done=done, tracker=track) if ranks.first else None
        try:
            _run(session, out, done, metrics, watch)
        finally:
            if metrics is not None:
                metrics.close()
    return session


def _run(session: Session, out: Path, done: int, metrics: Metrics | None, watch: Watcher) -> None:
    """Take the steps that are left, look at held-out text and save where it is time."""
    recipe, root = session.recipe, out / CHECKPOINTS
    for step in range(done, recipe.steps):
        began = time.perf_counter()
        try:
            values = advance(session, step)
        except DivergedError as error:
            kept, _ = checkpoint.latest(root)
            last = f"The last good checkpoint is {kept}" if kept else "There is no checkpoint yet"
            raise DivergedError(f"training stopped at {error} {last}. Lower the recipe's `lr`, or the strength of its method.") from error
        seconds = time.perf_counter() - began
        values |= {"lr": recipe.learning_rate(step), "tokens_per_second": recipe.loss_terms / seconds, "seconds": seconds}
        end = step + 1 == recipe.steps
        if end or (step + 1) % recipe.evaluate_every == 0:
            values |= _looked(session)
        if metrics is not None:
            metrics.write(step + 1, values)
        watch(Seen(step + 1, values))
        if end or (step + 1) % recipe.save_every == 0:
            facts = {"recipe": recipe.described(), "tokens": session.tokens.facts["parts"], "rows_read": (step + 1) * recipe.rows}
            checkpoint.save(root, session.model, session.optimizer, step=step + 1, facts=facts, ranks=session.ranks)


def _looked(session: Session) -> dict[str, float]:
    """Return held-out losses and the method's health."""
    losses = evaluate(session.model, session.run, session.recipe, session.tokens.held, session.ranks)
    values = {"held_out_loss": losses.latent, "quantized_loss": losses.nearest}
    if session.run is not None:
        total = session.run.health().total
        values |= {name: getattr(total, name) for name in ("flips", "oscillation", "dead", "clipped", "distance")}
    return values


def _resumed(session: Session, out: Path, watch: Watcher) -> int:
    """Load the newest whole checkpoint, if there is one, and return the steps that are done."""
    folder, refused = checkpoint.latest(out / CHECKPOINTS)
    for words in refused:
        watch(Seen(0, {}, f"refused: {words} The one before it is used."))
    if folder is None:
        watch(Seen(0, {}, "no checkpoint yet: beginning at the first step"))
        return 0
    facts = checkpoint.load(folder, session.model, session.optimizer, ranks=session.ranks)
    if facts["tokens"] != session.tokens.facts["parts"]:
        raise ValueError(f"`data`: {folder} was trained on other tokens than {session.tokens.folder} holds. Give the run's own data.")
    watch(Seen(facts["step"], {}, f"resumed after step {facts['step']}"))
    return int(facts["step"])


def _tokens(recipe: Recipe, out: Path, data: str | None, tokenizer: str | None, vocabulary: int, ranks: Ranks, watch: Watcher) -> Tokens:
    """Return the run's tokens, made by the first process where they are not there."""
    ready = data is not None and (Path(data) / INDEX).is_file()
    folder = Path(str(data)) if ready else out / DATA

    def make() -> None:
        wanted = Wanted(recipe.steps * recipe.loss_terms + 1, recipe.evaluate_rows * recipe.length + 1)
        tokenize(
            lambda: documents(data),
            folder,
            wanted=wanted,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            source=data or "the interpreter's own sources",
            progress=lambda count: watch(Seen(0, {}, f"{count:,} tokens")),
        )

    if not ready:
        ranks.alone(make)
    tokens = open_tokens(folder, verify=ranks.first)
    if tokens.facts["vocabulary"] > vocabulary:
        raise ValueError(
            f"`data`: {folder} has tokens of a vocabulary of {tokens.facts['vocabulary']}, the model knows {vocabulary}. "
            "Give the text itself, or a recipe whose architecture has a larger `vocabulary`."
        )
    for name, part in (("training", tokens.train), ("evaluation", tokens.held)):
        if not part.sequences(recipe.length):
            raise ValueError(
                f"`data` is too short: {part.tokens} tokens for {name}, one sequence takes {recipe.length + 1}. Give more text."
            )
    return tokens


def _check(recipe: Recipe, out: Path, told: dict[str, Any], *, resume: bool, start: Path | None) -> None:
    """Refuse a folder that holds another run, or a cooldown from nothing."""
    if recipe.cooldown and start is None:
        raise ValueError(f"`start` is missing: the recipe {recipe.name!r} goes on from a finished model. Give a folder with --start.")
    if not (out / RUN).is_file():
        return
    if not resume:
        raise ValueError(f"`out`: {out} holds a run already. Go on with it by --resume, or give another folder.")
    try:
        before = json.loads((out / RUN).read_text(encoding="utf-8"))
        asked = {**before["recipe"], **{key: before[key] for key in ("data", "tokenizer", "start")}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`out`: {out / RUN} cannot be read ({type(error).__name__}). Give another folder.") from error
    now = {**told["recipe"], **{key: told[key] for key in ("data", "tokenizer", "start")}}
    different = [f"{key} was {asked.get(key)!r}, is {value!r}" for key, value in now.items() if asked.get(key) != value]
    if different:
        raise ValueError(f"`resume`: {out} was started otherwise: {'; '.join(different[:4])}. Give what it was started with.")


def _folder_of(start: Path | None) -> Path | None:
    """Return the model's folder: an earlier run keeps it inside."""
    if start is None or not (start / RUN).is_file():
        return start
    if not (start / MODEL).is_dir():
        raise ValueError(f"`start`: the run in {start} is not finished: it has no {MODEL}. Finish it by --resume.")
    return start / MODEL


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)
