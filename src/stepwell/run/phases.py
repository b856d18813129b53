"""Phases: is an optimizer inside a step, and is the hook that fired the outermost one?

A subclass that calls `super().step()` fires the hooks twice; an exception inside a step skips the post hook. Counting depth cannot tell
the one from the other, so the outermost call is known by its frame: the step that opened is still running exactly while its frame is on
the stack.
"""

import sys
from types import FrameType

from torch.optim import Optimizer

from stepwell.run.managed import local


class Phase:
    """The step that one optimizer is in, if any."""

    def __init__(self) -> None:
        self._frame: FrameType | None = None

    @property
    def stale(self) -> bool:
        """Whether a step opened and never closed: an exception left it."""
        return self._frame is not None and not self._running()

    def opens(self, frame: FrameType) -> bool:
        """Say whether a step running in this frame is an outermost one, and if so open it."""
        if self._frame is not None and self._running():
            return False
        self._frame = frame
        return True

    def outermost(self, frame: FrameType) -> bool:
        """Say whether the step running in this frame is the one that opened."""
        return self._frame is frame

    def close(self) -> None:
        """End the step."""
        self._frame = None

    def _running(self) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def creates_state(optimizer: Optimizer) -> bool:
    """Whether this is torch.distributed.checkpoint's step that only creates state: rate 0, zero gradients, no state yet."""
    if optimizer.state or any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
        return False
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    return not any(bool(local(gradient).any()) for gradient in gradients)


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler tells a fused optimizer to leave everything alone."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
