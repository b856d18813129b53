"""Activation grids: numbers between layers rounded to 8 bits, with a gradient that goes straight through.

Two schemes. Dynamic: symmetric, one scale per token, taken from the token itself, `scale = max |x| / 127`. Static: one scale and zero
point per tensor, known beforehand, in the arithmetic of ONNX's QuantizeLinear, `clamp(round(x / scale) + zero, -128, 127)`: division in
float32, ties to even.

Source of the straight-through gradient: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons"
(arXiv:1308.3432). Where a static range clips, the gradient stops.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LOW, HIGH = -128, 127


class Range(NamedTuple):
    """A static 8-bit grid of activations.

    Attributes:
        scale: the step, a float32 value.
        zero: the code that stands for zero, -128..127.
    """

    scale: float
    zero: int

    @staticmethod
    def of(low: float, high: float) -> "Range":
        """Return the grid that reaches from the lowest to the highest activation, and holds zero.

        >>> Range.of(0.0, 255.0)
        Range(scale=1.0, zero=-128)
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(torch.tensor((high - low) / (HIGH - LOW), dtype=torch.float32)) or 1.0
        return Range(scale, min(HIGH, max(LOW, round(LOW - low / scale))))


def per_token(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return activations rounded to 8 bits under one symmetric scale per token.

    Args:
        x: any shape and float dtype; rounded in float32.
        dims: the dimensions that a token extends over.

    >>> per_token(torch.tensor([[1.0, 0.254, -0.5]]), (-1,)) * 127
    tensor([[127.,  32., -64.]])
    """
    return _Dynamic.apply(x, dims)  # type: ignore[no-any-return, no-untyped-call]


def per_tensor(x: Tensor, grid: Range) -> Tensor:
    """Return activations rounded to 8 bits on a static grid; the gradient stops where the grid's ends clip.

    >>> per_tensor(torch.tensor([0.6, -9.0, 300.0]), Range(scale=1.0, zero=-128))
    tensor([  1.,   0., 255.])
    """
    return _Static.apply(x, grid.scale, grid.zero)  # type: ignore[no-any-return, no-untyped-call]


def operators(x: Tensor, grid: Range) -> Tensor:
    """Return `per_tensor` as the two ONNX operators, for torch.export.

    With unsigned codes, which are the same grid: onnxruntime 1.31 makes them unsigned itself, and fails where a transpose is in between.
    """
    scale, zero = torch.tensor(grid.scale), torch.tensor(grid.zero - LOW, dtype=torch.uint8)
    codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape, version=21)
    return torch.onnx.ops.symbolic("DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=x.shape, version=21)


class _Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        work = x.float()
        scale = work.abs().amax(dims, keepdim=True) / HIGH
        return ((work / torch.where(scale > 0, scale, 1.0)).round() * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float, zero: int) -> Tensor:
        codes = (x.float() / scale).round() + zero
        return ((codes.clamp(LOW, HIGH) - zero) * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero = inputs
        ctx.save_for_backward((x >= (LOW - zero - 0.5) * scale) & (x <= (HIGH - zero + 0.5) * scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None
