"""A model's training mode: evaluation for the length of a block, every module as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every module in evaluation mode: no dropout, fixed batch statistics; all losses are of one function."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
