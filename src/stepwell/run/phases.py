"""Phases: is an optimizer inside a step, and is the hook that fired the outermost one?

A subclass that calls `super().step()` fires the hooks twice; an exception inside a step skips the post hook. Counting depth cannot tell
the one from the other, so the outermost call is known by its frame: the step that opened is still running exactly while its frame is on
the stack.
"""

import sys
from types import FrameType


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
