"""Tally: counts the evaluations of a loss and the time they take, part by part, and tells how far a measurement has come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stepwell.explain.records import Spent

BatchLoss = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[str, float], None]
BACKWARD = 2.0  # forward passes that a backward pass takes, for the progress bar


class Tally:
    """Passes over all batches, so far and by part."""

    def __init__(self, batches: int, progress: Progress | None) -> None:
        """Begin at zero; `progress` is told the part and the passes so far at every batch."""
        self._batches, self._progress = batches, progress
        self._forward = self._backward = 0
        self._part = ""
        self._spent: dict[str, Spent] = {}

    def counted(self, loss: BatchLoss) -> BatchLoss:
        """Return the loss of a batch, counted."""

        def call(model: nn.Module, batch: Any) -> Tensor:
            self._forward += 1
            self._tell()
            value = loss(model, batch)
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._back)  # type: ignore[no-untyped-call]
            return value

        return call

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside towards one part; parts of one name add up."""
        began, forward, backward = time.perf_counter(), self._forward, self._backward
        self._part = name
        self._tell()
        try:
            yield
        finally:
            before = self._spent.get(name, Spent(name, 0.0, 0.0, 0.0))
            self._spent[name] = Spent(
                name,
                before.forward + (self._forward - forward) / self._batches,
                before.backward + (self._backward - backward) / self._batches,
                before.seconds + time.perf_counter() - began,
            )

    @property
    def calls(self) -> int:
        """How often the loss of a batch was evaluated."""
        return self._forward

    @property
    def spent(self) -> tuple[Spent, ...]:
        """What each part took, in the order of their beginning."""
        return tuple(self._spent.values())

    def _back(self, gradient: Tensor) -> None:
        self._backward += 1
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._part, (self._forward + BACKWARD * self._backward) / self._batches)
