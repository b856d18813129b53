"""Gauss-Newton: the diagonal of the loss's curvature from labels that the model draws itself, for `curvature=`.

Source: the sampled-label estimate offered by Kwun et al., "LOTION" (arXiv:2510.08757), in the batched form of Liu et al., "Sophia"
(arXiv:2305.14342), algorithm 2: the scores of sampled labels are independent with mean zero, so that N times the squared gradient of a
mean over N terms is an unbiased estimate of the Gauss-Newton (equally the Fisher) diagonal of the mean cross entropy.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepwell.modes import evaluating

Logits = Callable[[nn.Module, Any], Tensor]


def gauss_newton(model: nn.Module, logits: Logits, batches: Iterable[Any], *, draws: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return the Gauss-Newton diagonal of the mean cross entropy for every trained parameter: `lotion(q, curvature=...)`.

    Args:
        model: a classifier or language model, as it is now; the curvature is not followed when the weights move.
        logits: `logits(model, batch)`, `(*shape, classes)`.
        batches: inputs; labels in them are not used.
        draws: of all labels, each a backward pass per batch.
        seed: of the draws.

    Returns:
        Parameter name -> `(*shape)` of the parameter, 0 or more, in loss per squared weight; its own unit, so no `loss_terms` are needed.

    Raises:
        TypeError: one batch in place of a list of them.
        ValueError: no batches, or draws that are no positive whole number.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"`draws` must be a whole number, 1 or more: got {draws!r}.")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of batches: got a {type(batches).__name__}. Write [batch] for a single one.")
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found, count = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in held.items()}, 0
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            scores = logits(model, batch).flatten(0, -2)
            generator = torch.Generator(scores.device).manual_seed(seed + count)
            odds = scores.detach().float().softmax(-1)
            for draw in range(draws):
                labels = torch.multinomial(odds, 1, generator=generator)[:, 0]
                value = cross_entropy(scores, labels)
                gradients = torch.autograd.grad(value, list(held.values()), retain_graph=draw + 1 < draws, allow_unused=True)
                for name, gradient in zip(held, gradients, strict=True):
                    if gradient is not None:
                        found[name].addcmul_(gradient, gradient, value=len(labels) / draws)
            count += 1
    if not count:
        raise ValueError("`batches` must hold data: got no batch.")
    return {name: total.div_(count) for name, total in found.items()}
