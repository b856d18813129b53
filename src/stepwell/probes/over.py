"""Over: a loss per batch, as the loss over fixed data that every probe takes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from stepwell.probes.stage import Loss


def over(loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> Loss:
    """Return the mean of `loss(model, batch)` over batches as a function of the model.

    Args:
        loss: returns the mean loss of one batch as a tensor with one element.
        batches: an iterator is read once and kept. Batches of equal size give the mean over the data; every batch counts the same.

    Raises:
        TypeError: one batch in place of a list of them.
        ValueError: no batches.

    >>> import torch
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[2.0]])
    >>> over(lambda model, x: model(x).mean(), [torch.ones(3, 1), torch.zeros(3, 1)])(layer).item()
    1.0
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of batches: got a {type(batches).__name__}. Write [batch] for a single one.")
    kept = list(batches)
    if not kept:
        raise ValueError("`batches` must hold data: got no batch.")

    def mean(model: nn.Module) -> Tensor:
        total = loss(model, kept[0])
        for batch in kept[1:]:
            total = total + loss(model, batch)
        return total / len(kept)

    return mean
