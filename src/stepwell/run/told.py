"""Told: what a method is told in a step, as plain numbers, which is what kernels take; other passes see them as 0-dim tensors."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepwell import randomness
from stepwell.methods.base import Context, Method
from stepwell.quantizers import Quantizer
from stepwell.run.managed import Managed
from stepwell.scales import Fit
from stepwell.schedules import value_at

MOVED = "moved"  # among a context's tensors: what latent weights were multiplied by before the optimizer's step


class Told(NamedTuple):
    """A `Context`, field by field, before its numbers are tensors; a number may be a 0-dim tensor already.

    Attributes:
        seed, name: with the step, what random draws depend on.
    """

    quantizer: Quantizer
    step: int
    lr: float | Tensor
    loss_terms: float | Tensor
    fit: Fit | None
    tensors: Mapping[str, Tensor]
    seed: int
    name: str
    offset: int
    scheduled: Mapping[str, float]
    correction: float | Tensor | None = None
    carries: bool = False

    @property
    def key(self) -> int:
        """The key of the parameter's random stream at this step."""
        return randomness.stream(self.seed, self.step, self.name)

    def context(self, weight: Tensor) -> Context:
        """Return the context, on the weight's device."""
        return Context(
            quantizer=self.quantizer,
            step=self.step,
            lr=scalar(self.lr, weight),
            loss_terms=scalar(self.loss_terms, weight),
            fit=self.fit,
            tensors=self.tensors,
            key=torch.full((), self.key, dtype=torch.int64, device=weight.device),
            offset=self.offset,
            scheduled={name: scalar(value, weight) for name, value in self.scheduled.items()},
            correction=None if self.correction is None else scalar(self.correction, weight),
            carries=self.carries,
        )


class Teller:
    """Tells methods what they may know, and asks their schedules once per step for all parameters."""

    def __init__(self, steps: Mapping[Optimizer, int], seed: int) -> None:
        """Take the optimizers' steps, which go on, and the seed of every draw."""
        self._steps, self._seed = steps, seed
        self._values: dict[int, tuple[int, dict[str, float]]] = {}

    def tell(self, one: Managed, terms: float | Tensor, source: Tensor | None = None, *, moves: bool = False) -> Told:
        """Return what a parameter's method may know.

        `source`: the weight to fit scales to, by default the parameter's own value; `moves`: also what scales that carry weights move by.
        """
        step = max(self._steps.values(), default=0) if one.optimizer is None else self._steps[one.optimizer]
        return Told(
            quantizer=one.grid,
            step=step,
            lr=one.group.get("lr", 0.0),
            loss_terms=terms,
            fit=one.held_fit(source),
            tensors={**one.tensors, MOVED: one.moved} if moves and one.moved is not None else one.tensors,
            seed=self._seed,
            name=one.name,
            offset=one.offset,
            scheduled=self._scheduled(one.method, step),
            carries=one.carries,
        )

    def _scheduled(self, method: Method, step: int) -> dict[str, float]:
        asked, values = self._values.get(id(method), (-1, {}))
        if asked != step:
            values = {name: value_at(name, value, step) for name, value in method.schedules.items()}
            self._values[id(method)] = (step, values)  # the Run keeps the method alive
        return values


def scalar(value: float | Tensor, weight: Tensor) -> Tensor:
    """Return a 0-dim tensor beside the weight; a number from the device is not read back."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        return value.detach().to(weight.device, dtype)
    return _constant(float(value), dtype, weight.device)


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a 0-dim tensor that nobody writes to: parameters share most numbers of a step, and making one costs as a small pass does."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)
