"""Outcome: what a finished run leaves: the losses in float, rounded and rounded at random, a figure, and a model that can be shipped.

OUT/model/                       config.json, model.safetensors and the tokenizer: what transformers loads is what was trained for,
                                 the weights on the grid (in full precision: the weights)
OUT/model/encoded.safetensors    their codes and scales, for `stepwell.load` and the exporters; not in full precision
OUT/results.json, OUT/loss.svg   the table and the curves
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from stepwell.export.extras import quiet
from stepwell.report import Axis, Panel, Series, draw, standalone
from stepwell.storage import save
from stepwell.train import metrics
from stepwell.train.evaluation import Losses, evaluate, holding
from stepwell.train.pretrain import MODEL
from stepwell.train.ranks import whole
from stepwell.train.session import Session
from stepwell.train.tokens import TOKENIZER

CONFIG, ENCODED, RESULTS, FIGURE = "config.json", "encoded.safetensors", "results.json", "loss.svg"
POINTS = 200  # of a curve: more would not be seen


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        recipe, method, quantizer: in words.
        steps, tokens: trained.
        parameters, quantized: how many weights, and how many of them lie on the grid.
        losses: on held-out text, in nats per token.
        tokens_per_second: median over the steps of this machine; NaN where their metrics are lost.
        files: name -> path.
    """

    recipe: str
    method: str
    quantizer: str
    steps: int
    tokens: int
    parameters: int
    quantized: int
    losses: Losses
    tokens_per_second: float
    files: dict[str, str]


def finish(session: Session, out: Path) -> Outcome:
    """Measure what was trained and write the model, the results and the figure. Every process calls it; the first one writes.

    Raises:
        OSError: something cannot be written; a model that was there before is as it was.
    """
    recipe, model, run = session.recipe, session.model, session.run
    losses = evaluate(model, run, recipe, session.tokens.held, session.ranks, draws=recipe.draws)
    encoded = {} if run is None else run.encoded()
    described = recipe.described()
    folder = out / MODEL
    files = {"model": folder, "results": out / RESULTS, "figure": out / FIGURE, "metrics": out / metrics.FILE}
    if encoded:
        files["encoded"] = folder / ENCODED
    outcome = Outcome(
        recipe.name,
        described["method"],
        str((recipe.made_method() or recipe).quantizer),  # the default method takes more codes than the recipe's grid names
        recipe.steps,
        recipe.steps * recipe.loss_terms,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(one.codes.numel() for one in encoded.values()),
        losses,
        _median([line["tokens_per_second"] for line in metrics.read(out)]) if session.ranks.first else math.nan,
        {name: str(path.resolve()) for name, path in files.items()},
    )
    with holding(model, {name: one.decode() for name, one in encoded.items()}):  # also where the method trains on latent weights
        weights = {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()}
        session.ranks.alone(lambda: _write(session, out, outcome, weights, encoded))
    return outcome


def as_mapping(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as names and plain values; what is no finite number is None."""
    losses = {name: value if math.isfinite(value) else None for name, value in outcome.losses._asdict().items()}
    speed = outcome.tokens_per_second if math.isfinite(outcome.tokens_per_second) else None
    return outcome._asdict() | {"losses": losses, "tokens_per_second": speed}


def figure(lines: list[dict[str, Any]]) -> str:
    """Return the curves of a run as an SVG file: training loss in means over stretches, held-out losses where they were taken."""
    stretch = max(1, len(lines) // POINTS)
    pieces = [[line for line in lines[k : k + stretch] if line["loss"] is not None] for k in range(0, len(lines), stretch)]
    pieces = [piece for piece in pieces if piece]
    curves = [Series("training", [p[-1]["step"] for p in pieces], [sum(one["loss"] for one in p) / len(p) for p in pieces], colour=0)]
    for name, key, colour in (("held out, float", "held_out_loss", 1), ("held out, quantized", "quantized_loss", 2)):
        seen = [line for line in lines if line.get(key) is not None]
        curves.append(Series(name, [line["step"] for line in seen], [line[key] for line in seen], colour=colour))
    panel = Panel(curves, Axis("optimizer step"), Axis("loss, nats per token"))
    return standalone(draw([panel], label="Loss of the training run over its steps"))


def _write(session: Session, out: Path, outcome: Outcome, weights: Mapping[str, torch.Tensor], encoded: Mapping[str, Any]) -> None:
    """Write the model, the figure and the results."""
    try:
        _write_model(session, out / MODEL, weights, encoded)
        (out / FIGURE).write_text(figure(metrics.read(out)), encoding="utf-8")
        (out / RESULTS).write_text(json.dumps(as_mapping(outcome), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the trained model cannot be written to {out} ({' '.join(str(error).split())[:200]}). Its last checkpoint is whole; make room "
            "and start again with --resume."
        ) from error


def _write_model(session: Session, folder: Path, weights: Mapping[str, torch.Tensor], encoded: Mapping[str, Any]) -> None:
    """Write the folder aside, then give it its name: it is there whole, or not."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    inner: Any = session.model
    try:
        with quiet():
            inner.save_pretrained(aside, state_dict=dict(weights))
        for path in aside.glob("*.safetensors"):
            path.chmod((aside / CONFIG).stat().st_mode)  # safetensors makes files that only their owner can read
        for path in (session.tokens.folder / TOKENIZER).iterdir():
            shutil.copy(path, aside / path.name)
        if encoded:
            save(encoded, aside / ENCODED)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old)
    else:
        os.replace(aside, folder)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else math.nan
