"""Directions: random and partial displacements of the weights, drawn anew whenever they are asked for, so that they need no memory."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stepwell.blocks import from_blocks, to_blocks
from stepwell.probes.grid import grid
from stepwell.probes.points import Move, Place, weight
from stepwell.quantizers import Encoded
from stepwell.randomness import stream


def alone(chosen: str, target: Place) -> Move:
    """Return the displacement of one tensor; the others stay."""
    return lambda name, base: weight(target[name], base) - base if name == chosen else torch.zeros_like(base)


def keys(seed: int, draws: int) -> list[Callable[[str], int]]:
    """Return a function from a tensor's name to the key of its draws, for every draw."""
    return [lambda name, draw=draw: stream(seed, draw, name) for draw in range(draws)]  # type: ignore[misc]


def uniform_noise(target: Place, key: Callable[[str], int]) -> Move:
    """Return uniform noise within half a step of every weight; the clipping error where it is beyond the range."""

    def move(name: str, base: Tensor) -> Tensor:
        encoded = target[name]
        assert isinstance(encoded, Encoded)
        held = grid(encoded, base)
        draw = torch.rand(base.shape, generator=_seeded(key(name), base), dtype=base.dtype, device=base.device)
        draw.sub_(0.5).mul_(held.step(base))
        beyond = held.beyond(base)
        return torch.where(beyond, held.round(base) - base, draw) if bool(beyond.any()) else draw

    return move


def axes(target: Place) -> dict[str, int | None]:
    """Return the contraction dimension of every weight of a point, as its quantizer has it; None is the layout of Linear."""
    return {name: value.quantizer.axis if isinstance(value, Encoded) else None for name, value in target.items()}


def gaussian_noise(axes: Mapping[str, int | None], key: Callable[[str], int]) -> Move:
    """Return Gaussian noise whose output rows, across the contraction dimensions `axes`, have the norms of the weight's."""

    def move(name: str, base: Tensor) -> Tensor:
        axis = axes[name]
        draw = torch.randn(base.shape, generator=_seeded(key(name), base), dtype=base.dtype, device=base.device)
        draw = to_blocks(draw, "channel", axis)
        norms = to_blocks(base, "channel", axis).norm(dim=1, keepdim=True)
        return from_blocks(draw.mul_(norms / draw.norm(dim=1, keepdim=True)), tuple(base.shape), "channel", axis)

    return move


def _seeded(key: int, like: Tensor) -> torch.Generator:
    return torch.Generator(device=like.device).manual_seed(key)
