"""Rounding: a weight lies between two neighbours of the grid, and a rounding rule picks one of the two.

Source for randomized rounding and its variance: Kwun et al., "LOTION" (arXiv:2510.08757), section 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Bracket(NamedTuple):
    """The grid neighbours of each weight and the weight itself, clamped to the grid's range.

    Attributes:
        lower, x, upper: `(*shape)` each, `lower <= x <= upper`, all in the same units.
        upper_even: `(*shape)` booleans, whether the upper neighbour has the even code; None where ties do not matter.
    """

    lower: Tensor
    x: Tensor
    upper: Tensor
    upper_even: Tensor | None = None


Rounding = Callable[[Bracket], Tensor]


def nearest(bracket: Bracket) -> Tensor:
    """Return the closer neighbour; ties go to the even code.

    Args:
        bracket: neighbours and clamped weight, each `(*shape)`. Without `upper_even` ties go down.

    Returns:
        `(*shape)`, every element `lower` or `upper`.

    >>> nearest(Bracket(torch.tensor([0.0, 0.0]), torch.tensor([0.25, 0.75]), torch.tensor([1.0, 1.0])))
    tensor([0., 1.])
    """
    below, above = bracket.x - bracket.lower, bracket.upper - bracket.x
    up = below > above
    if bracket.upper_even is not None:
        up |= (below == above) & bracket.upper_even
    return torch.where(up, bracket.upper, bracket.lower)


def stochastic(generator: torch.Generator | None = None) -> Rounding:
    """Return randomized rounding: an end is drawn with a probability proportional to how close it is.

    Args:
        generator: source of the draws, on the weights' device; None takes torch's global one.

    Returns:
        A function from a `Bracket` to a tensor of the same shape, unbiased around the *clamped* weight, with `variance(bracket)`;
        a weight on the grid stays.

    >>> stochastic(torch.Generator().manual_seed(0))(Bracket(torch.zeros(4), torch.full((4,), 0.5), torch.ones(4)))
    tensor([1., 0., 1., 1.])
    """

    def draw(bracket: Bracket) -> Tensor:
        uniform = torch.empty_like(bracket.x).uniform_(0.0, 1.0, generator=generator)
        return pick(bracket, uniform)

    return draw


def pick(bracket: Bracket, uniform: Tensor) -> Tensor:
    """Return randomized rounding for given uniform draws in [0, 1), shape `(*shape)`: the upper end where `uniform` is below its odds."""
    return torch.where(uniform * (bracket.upper - bracket.lower) < bracket.x - bracket.lower, bracket.upper, bracket.lower)


def variance(bracket: Bracket) -> Tensor:
    """Return the variance of randomized rounding, elementwise.

    Args:
        bracket: neighbours and clamped weight, each `(*shape)`, in weight units.

    Returns:
        `(x - lower) * (upper - x)`, shape `(*shape)`, in squared weight units; zero on the grid.
        Weights outside the grid were clamped first: their bias is *not* part of this number.

    >>> variance(Bracket(torch.tensor([0.0]), torch.tensor([0.25]), torch.tensor([1.0])))
    tensor([0.1875])
    """
    return (bracket.x - bracket.lower) * (bracket.upper - bracket.x)
