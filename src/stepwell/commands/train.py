"""`stepwell train RECIPE`: a language model from text to a folder that ships, resumable at any moment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepwell.commands.files import check_folder
from stepwell.commands.output import Json, console, print_json, print_table

if TYPE_CHECKING:
    from stepwell.quantizers import Quantizer
    from stepwell.train.outcome import Outcome
    from stepwell.train.pretrain import Seen, Watcher
    from stepwell.train.recipe import Recipe

RECIPE = "recipes.lm:NAME such as recipes.lm:int4_15m, or module:function or file.py:function, which returns a Recipe."
DATA = "Text, JSONL or parquet (file or folder), or a dataset such as c4; the interpreter's own Python sources if left out."
OURS = "safetensors"  # the target that holds any grid, and that no runtime reads
HEALTH = ("flips", "oscillation", "dead", "clipped")


def train(
    recipe: Annotated[str, typer.Argument(help=RECIPE)],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    data: Annotated[str | None, typer.Option(help=DATA, show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its newest whole checkpoint.")] = False,
    start: Annotated[Path | None, typer.Option(help="Hugging Face folder, or an earlier run's, to go on from.", show_default=False)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, tokenizer.json or bytes; trained on the data if left out.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Runtime whose grid to train for, in place of the recipe's: gguf:q4_0, ..", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of the recipe's.", show_default=False)] = None,
    micro: Annotated[
        int | None, typer.Option(help="Sequences at once in memory; changes the result by rounding error only.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and draws, in place of the recipe's.", show_default=False)] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default=False)] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    replicate: Annotated[bool, typer.Option("--replicate", help="Under torchrun: whole copies (DDP), not shards (FSDP2).")] = False,
    track: Annotated[str | None, typer.Option(help="tensorboard or wandb, besides metrics.jsonl.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Train a language model by a recipe, for a grid or in full precision; measure it rounded, and write a model that ships."""
    if resume and not out.is_dir():
        raise ValueError(
            f"`resume`: there is no folder {out}, so no run to go on with. Give its folder, or leave --resume out to begin one."
        )
    check_folder(out)
    from stepwell.recipes.find import find
    from stepwell.train.outcome import as_mapping, finish
    from stepwell.train.pretrain import pretrain
    from stepwell.train.ranks import together

    wanted = changed(find(recipe), target=target, steps=steps, micro=micro, seed=seed, save_every=save_every, compiled=compiled)
    tracker = tracker_of(track)
    source: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "start": start}
    with together(), bar(wanted) as watch:
        session = pretrain(wanted, out, **source, resume=resume, replicate=replicate, track=tracker, watch=watch)
        outcome = finish(session, out)
    if not session.ranks.first:
        return
    if json:
        print_json(as_mapping(outcome))
        return
    print_table(summary(outcome), title=title(outcome), note="Losses on held-out text.")
    console().print(
        *ending(outcome, target or holder((wanted.made_method() or wanted).quantizer)), sep="\n", highlight=False, soft_wrap=True
    )


def changed(
    recipe: "Recipe",
    *,
    target: str | None,
    steps: int | None,
    micro: int | None,
    seed: int | None,
    save_every: int | None,
    compiled: bool,
) -> "Recipe":
    """Return a recipe with what the command line asks for; a shorter run warms up for a tenth of it at most."""
    from dataclasses import replace

    from stepwell.ship.targets import grid

    quantizer = None if target is None else grid(target, bits=None, block=None)
    given = {"quantizer": quantizer, "steps": steps, "micro": micro, "seed": seed, "save_every": save_every, "compile": compiled or None}
    asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if steps is not None and steps > 0:
        asked["warmup"] = min(recipe.warmup, steps // 10)
    return replace(recipe, **asked)


def tracker_of(name: str | None) -> Any:
    """Return the tracker's name, once it is one that is known.

    Raises:
        ValueError: it is not.
    """
    if name not in (None, "tensorboard", "wandb"):
        raise ValueError(f"`track` must be tensorboard or wandb: got {name!r}.")
    return name


@contextmanager
def bar(recipe: "Recipe") -> Iterator["Watcher"]:
    """Show a progress bar on standard error, in the first process, and yield what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from stepwell.train.ranks import here

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not here().first) as progress:
        task = progress.add_task("reading the data", total=recipe.steps)
        known: dict[str, float] = {}

        def watch(seen: "Seen") -> None:
            known.update(seen.values)
            if seen.words and not seen.words.endswith("tokens"):
                progress.console.print(seen.words, highlight=False)
            words = described(known) if known else seen.words
            progress.update(task, completed=seen.step, description=words)

        try:
            yield watch
        except KeyboardInterrupt:
            progress.console.print("stopped; the same command with --resume goes on from the last checkpoint", highlight=False)
            raise


def described(values: dict[str, float]) -> str:
    """Return the newest numbers of a run in one line.

    >>> described({"loss": 2.5, "tokens_per_second": 1234.5, "quantized_loss": 2.625, "flips": 0.01})
    'loss 2.5000  quantized 2.6250  1,234 tokens/s  flips 1.0 %'
    """
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    if "quantized_loss" in values:
        parts.append(f"quantized {values['quantized_loss']:.4f}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    parts += [f"{name} {100 * values[name]:.1f} %" for name in HEALTH if values.get(name, float("nan")) == values.get(name)]
    return "  ".join(parts)


def title(outcome: "Outcome") -> str:
    """Return what was trained, in one line."""
    on_grid = f", {outcome.quantized / 1e6:.2f} on the grid" if outcome.quantized else ""
    return (
        f"{outcome.recipe}: {outcome.method}, {outcome.quantizer}; {outcome.parameters / 1e6:.2f} million parameters{on_grid}; "
        f"{outcome.steps:,} steps, {outcome.tokens:,} tokens, {outcome.tokens_per_second:,.0f} tokens/s"
    )


def holder(grid: "Quantizer") -> str:
    """Return a target that holds a grid: compressed-tensors where that does, and ours where no runtime does.

    >>> from stepwell.presets import int3
    >>> holder(int3())
    'compressed-tensors:int3'
    """
    from stepwell.runtimes import targets
    from stepwell.ship.targets import known

    names = [row.name for row in targets() if row.name in known() and row.holds(grid)]
    return min(names, key=lambda name: not name.startswith("compressed-tensors"))


def ending(outcome: "Outcome", target: str) -> list[str]:
    """Return where the files are, and the command that ships them; paths as short as they can be."""
    paths = {name: min(os.path.relpath(path), path, key=len) for name, path in outcome.files.items()}
    command = f"export {paths['model']} {paths['encoded']}" if "encoded" in paths else f"quantize {paths['model']}"
    alone = [f"No runtime holds {outcome.quantizer}: --target trains for one that `stepwell formats --targets` lists."]
    lines = [f"Model: {paths['model']}", f"Figure: {paths['figure']}", *(alone if target == OURS else []), "Ship it:"]
    return [*lines, f"  stepwell {command} OUT --target {target}"]


def summary(outcome: "Outcome") -> list[dict[str, object]]:
    """Return the rows of the terminal's table."""
    from math import exp

    words = {"latent": "float", "nearest": "rounded to nearest (RTN)", "randomized": "rounded at random (RR)"}
    return [
        {"weights": words[name], "loss_in_nats_per_token": f"{loss:.4f}", "perplexity": f"{exp(min(loss, 50)):.2f}"}
        for name, loss in outcome.losses._asdict().items()
    ]
