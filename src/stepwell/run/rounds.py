"""Rounds: when has every optimizer of a run stepped once more? Whoever watches the run is called then, not between two of them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Watcher = Callable[[bool], None]  # called with whether the run is about to end


class Rounds:
    """Counts the optimizers that have stepped since the last round, and calls the watchers when all have."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Wait for the first round."""
        self._optimizers, self._stepped = set(optimizers), set[Optimizer]()
        self._watchers: OrderedDict[int, Watcher] = OrderedDict()

    def add(self, watcher: Watcher) -> RemovableHandle:
        """Call a function after every round from now on; the handle's `remove()` ends that."""
        handle = RemovableHandle(self._watchers)
        self._watchers[handle.id] = watcher
        return handle

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled optimizer.step() runs this as it is
    def begins(self, optimizer: Optimizer) -> None:
        """Take note that an optimizer is about to step: if it has stepped in this round already, the others are not waited for."""
        if optimizer in self._stepped:
            self.call()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def ends(self, optimizer: Optimizer) -> None:
        """Take note of a step that was made."""
        self._stepped.add(optimizer)
        if self._stepped == self._optimizers:
            self.call()

    def call(self, *, last: bool = False) -> None:
        """End the round."""
        self._stepped.clear()
        for watcher in list(self._watchers.values()):
            watcher(last)
