"""Told: what a method is told in a step, as plain numbers, which is what kernels take; other passes see them as 0-dim tensors."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell import randomness
from stepwell.methods.base import Context
from stepwell.quantizers import Quantizer
from stepwell.scales import Fit


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
