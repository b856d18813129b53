"""Increases of the loss, measured on one part of the data while another part calibrates; each with the error of the paired difference."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from stepwell.advice.forecast import Estimate, Trained
from stepwell.probes.stage import Stage

BatchLoss = Callable[[nn.Module, Any], Tensor]
UPPER = 0.95  # one end of a 90 % interval
ALONE = 2.0  # the interval's factor where one batch leaves the error unknown
EVERY = 3  # one batch in so many calibrates


class Parts(NamedTuple):
    """The data, divided.

    Attributes:
        calibrating: GPTQ sees these.
        measuring: losses are measured on these.
        note: what was divided how, in words.
    """

    calibrating: list[Any]
    measuring: list[Any]
    note: str


class Losses:
    """The mean loss over batches as a function of the model, which remembers the loss of every batch."""

    def __init__(self, loss: BatchLoss, batches: Sequence[Any]) -> None:
        """Keep both; nothing is evaluated."""
        if not callable(loss):
            raise TypeError(
                f"`loss` must be a function of a model and a batch: got {type(loss).__name__}. "
                "Write `lambda model, batch: criterion(model(batch[0]), batch[1])`."
            )
        self._loss, self._batches = loss, batches
        self.last: list[float] = []

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the mean over batches, each of which counts the same."""
        parts = []
        for batch in self._batches:
            part = self._loss(model, batch)
            if not isinstance(part, Tensor) or part.numel() != 1:
                return part  # the stage refuses it
            parts.append(part.reshape(()))
        together = torch.stack(parts)
        self.last = together.detach().tolist()
        return together.mean()


def divide(batches: Iterable[Any], calibration: Iterable[Any] | None) -> Parts:
    """Divide the batches into a third that calibrates and the rest that measures; all of them measure if others calibrate.

    Raises:
        TypeError: one batch in place of a list of them.
        ValueError: no batches.
    """
    given = listed(batches, "batches")
    if calibration is not None:
        other = listed(calibration, "calibration")
        return Parts(other, given, f"GPTQ is calibrated on the {_count(other)} of `calibration`, losses are measured on {_count(given)}.")
    if len(given) == 1:
        note = "One batch both calibrates GPTQ and measures: GPTQ looks better than it is, and no error can be given. Give several batches."
        return Parts(given, given, note)
    first, rest = given[::EVERY], [batch for index, batch in enumerate(given) if index % EVERY]
    return Parts(first, rest, f"GPTQ is calibrated on {_count(first)} (every third), losses are measured on the other {len(rest)}.")


def increase(stage: Stage, losses: Losses, base: Sequence[float], method: Trained, *, settle: Losses | None = None) -> Estimate:
    """Return how much the loss has grown where the weights are now.

    Args:
        stage: the model.
        losses: the stage's own loss.
        base: what it was on every batch before.
        method: whose increase it is.
        settle: the loss on data that BatchNorm statistics are re-estimated on; None leaves them.
    """
    _ = stage.loss() if settle is None else stage.settled(settle)
    return Estimate(method, *paired(losses.last, base), True)


def paired(after: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference of losses over batches and both ends of its 90 % interval.

    The interval is that of Student's law; with one batch the value divided and multiplied by 2. A loss that is not finite makes all three
    infinite.

    >>> paired([1.5, 2.5, 3.5], [1.0, 2.0, 3.0]), paired([3.0], [1.0]), paired([math.nan], [1.0])
    ((0.5, 0.5, 0.5), (2.0, 1.0, 4.0), (inf, inf, inf))
    """
    changes = [now - then if math.isfinite(now) else math.inf for now, then in zip(after, before, strict=True)]
    mean = statistics.fmean(changes)
    if not math.isfinite(mean):
        return math.inf, math.inf, math.inf
    if len(changes) == 1:
        low, high = sorted((mean / ALONE, mean * ALONE))
        return mean, low, high
    margin = float(stdtrit(len(changes) - 1, UPPER)) * statistics.stdev(changes) / math.sqrt(len(changes))
    return mean, mean - margin, mean + margin


def listed(batches: Iterable[Any], argument: str) -> list[Any]:
    """Return batches as a list, or refuse what is none."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"`{argument}` must be an iterable of batches: got a {type(batches).__name__}. Write [batch] for a single one.")
    kept = list(batches)
    if not kept:
        raise ValueError(f"`{argument}` must hold data: got no batch.")
    return kept


def _count(batches: Sequence[Any]) -> str:
    return f"{len(batches)} batch{'es' if len(batches) > 1 else ''}"
