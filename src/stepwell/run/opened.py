"""What a step that is open remembers, so that it can be closed or undone."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from stepwell.methods.fisher import FISHER
from stepwell.run import moments
from stepwell.run.managed import SCALE, Managed

KEPT = (SCALE, FISHER)  # how the names begin of what a method's gradient moves, and a step that fails puts back
Terms = Callable[[Managed, int], float]
Replaced = tuple[tuple[Any, ...], dict[str, Any]]


class Hooks(NamedTuple):
    """What the stepper asks the Run: adopt outside writes, and count loss terms."""

    settle: Callable[[], None]
    terms: Terms


class Opened(NamedTuple):
    """One parameter inside a step.

    Attributes:
        one: the parameter.
        pushed: the optimizer's step count at a push; None without one.
        terms: loss terms.
        taken: whether the optimizer makes the whole step, so that nothing is done around it.
        scales: the method's own scales, and what they learn with, as they were before the step: one number per block each. With them the
            average of squared gradients, where a method keeps one.
        start: the latent weight before the step, times what its scales have carried it by since; kept where the method asks for a longer
            step and the optimizer has called its closure again, which puts other latent weights in its place.
    """

    one: Managed
    pushed: Tensor | float | None
    terms: float
    taken: bool
    scales: dict[str, Tensor]
    start: Tensor | None = None

    @property
    def unused(self) -> bool:
        """Whether there was a push that the optimizer never used."""
        return self.pushed is not None and bool(self.pushed == moments.step_of(self.one))

    def put_scales_back(self) -> None:
        """Undo what the method's gradient did to its scales and its average."""
        for key, tensor in self.scales.items():
            self.one.tensors[key].copy_(tensor)


def remember(one: Managed, terms: float, *, taken: bool) -> Opened:
    """Return the record of a parameter whose step begins; only a method that sees gradients can move its scales and its average."""
    moves = not taken and one.method.gradient is not None
    scales = {key: tensor.clone() for key, tensor in one.tensors.items() if moves and key.startswith(KEPT)}
    return Opened(one, None, terms, taken, scales)
