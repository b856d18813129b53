"""Straight-through training in plain autograd: the weight is rounded inside every forward pass, nothing of stepwell is used."""

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Round(torch.autograd.Function):
    """Round blocks of a matrix to a symmetric integer grid whose edge is the block's largest magnitude; identity backward.

    With `clip` the gradient passes only where the weight lies within `clip` times the grid's range.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, top: int, block: int, clip: float | None) -> Tensor:
        rows = weight.reshape(-1, block)
        scale = rows.abs().amax(1, keepdim=True) / top
        units = rows / scale
        ctx.passed = None if clip is None else (units.abs() <= clip * top).reshape(weight.shape)
        return (torch.round(units) * scale).reshape(weight.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return (gradient if ctx.passed is None else gradient * ctx.passed), None, None, None


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches, loss, *, names: list[str], top: int, block: int, clip: float | None = None
) -> list[float]:
    """Train with rounded weights in every forward pass; return the loss of every step. The model's parameters are the latent weights."""
    found = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        held = dict(model.named_parameters())
        seen = {name: Round.apply(held[name], top, block, clip) for name in names}
        value = loss(functional_call(model, seen, (inputs,)), targets)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found
