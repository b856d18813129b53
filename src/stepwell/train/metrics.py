"""Metrics: one line of JSON per step, and optionally TensorBoard or Weights & Biases beside it."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from stepwell.export.extras import need

FILE, BOARD = "metrics.jsonl", "tensorboard"
Tracker = Literal["tensorboard", "wandb"]
Sink = Callable[[int, Mapping[str, float]], None]


class Metrics:
    """The metrics of a run, a line per step in `metrics.jsonl`; a resumed run cuts off what was written after its checkpoint."""

    def __init__(self, out: Path, *, done: int = 0, tracker: Tracker | None = None) -> None:
        """Open the file and the tracker.

        Args:
            out: the run's folder.
            done: steps that are done: lines beyond them are removed.
            tracker: where else to write.

        Raises:
            ModuleNotFoundError: the tracker is not installed.
            ValueError: a tracker that is not known.
        """
        self._sink, self._end = _opened(tracker, out, done)
        path = out / FILE
        kept = [line for line in read(out) if line["step"] <= done] if path.is_file() else []
        aside = path.with_suffix(".part")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the line of a step; numbers that are not finite become null."""
        plain = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        self._sink(step, {key: value for key, value in plain.items() if value is not None})

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        self._end()


def read(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; a last line that a kill has cut off is left out."""
    lines = []
    for line in (out / FILE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _opened(tracker: Tracker | None, out: Path, done: int) -> tuple[Sink, Callable[[], None]]:
    """Return what takes a step's numbers, and what ends it."""
    if tracker is None:
        return lambda step, values: None, lambda: None
    if tracker == "tensorboard":
        return _tensorboard(out, done)
    if tracker == "wandb":
        return _wandb(out)
    raise ValueError(f"`track` must be tensorboard or wandb: got {tracker!r}.")


def _tensorboard(out: Path, done: int) -> tuple[Sink, Callable[[], None]]:
    need("tensorboard", extra="track")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(out / BOARD), purge_step=done + 1)

    def sink(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return sink, writer.close


def _wandb(out: Path) -> tuple[Sink, Callable[[], None]]:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`track` wandb: Weights & Biases is not installed. Run: pip install wandb") from error
    run = wandb.init(project="stepwell", name=out.name, dir=str(out), id=out.name, resume="allow")
    return lambda step, values: run.log(dict(values), step=step), run.finish
