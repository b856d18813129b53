"""Grid: one encoded weight's scales and zero points, held fixed while weights move over them.

Between two looks of a probe the grid must not follow the weights: "one step away" and every slice would lose their meaning.
An index is the place of a grid value in its format's sorted values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stepwell import grids
from stepwell.blocks import from_blocks, to_blocks
from stepwell.quantizers import Encoded, Quantizer
from stepwell.scales import Fit

SLACK = 1e-5  # of the range: the largest weight of a block lies on the edge of the grid up to float error


class Grid(NamedTuple):
    """The values that one weight can take, for weights of one shape.

    Attributes:
        quantizer: the format and the blocks.
        fit: `(blocks, 1)` scales and zero points.
        shape: of the weight.
    """

    quantizer: Quantizer
    fit: Fit
    shape: tuple[int, ...]

    @property
    def top(self) -> int:
        """The highest index."""
        return len(self.quantizer.format.values) - 1

    def round(self, weight: Tensor) -> Tensor:
        """Return the weight `(*shape)` on the grid."""
        return self._whole(self.quantizer.snap(self._blocks(weight), self.fit))

    def step(self, weight: Tensor) -> Tensor:
        """Return the distance of the neighbouring grid values of every weight, `(*shape)`, in weight units."""
        blocks = self._blocks(weight)
        if self.quantizer.format.uniform and self.quantizer.compute is None:
            return self._whole(self.fit.scale.abs().expand_as(blocks))
        found = self.quantizer.enclose(blocks, self.fit)
        return self._whole(found.upper - found.lower)

    def beyond(self, weight: Tensor) -> Tensor:
        """Return where the weight lies outside the grid's range by more than rounding error, `(*shape)` booleans."""
        units, format = self.fit.to_units(self._blocks(weight)), self.quantizer.format
        slack = SLACK * max(-format.low, format.high)
        return self._whole((units < format.low - slack) | (units > format.high + slack))

    def clip(self, weight: Tensor) -> Tensor:
        """Return the weight `(*shape)` moved to the grid's nearer end where it lies outside the range."""
        units, format = self.fit.to_units(self._blocks(weight)), self.quantizer.format
        inside = self.fit.to_weights(units.clamp(format.low, format.high))
        return torch.where(self.beyond(weight), self._whole(inside), weight)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the index of the grid value nearest to every weight, `(*shape)` int16."""
        return self._whole(self._place(grids.round_nearest(self.fit.to_units(self._blocks(weight)), self.quantizer.format)))

    def indices(self, encoded: Encoded) -> Tensor:
        """Return the index of every code, `(*shape)` int16."""
        return self._place(grids.from_codes(encoded.codes.to(self.fit.scale.device), self.quantizer.format, self.fit.scale.dtype))

    def corners(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the grid values around every weight, `(*shape)` int16 each: AdaRound's floor and ceiling."""
        found = grids.bracket(self.fit.to_units(self._blocks(weight)), self.quantizer.format)
        return self._whole(self._place(found.lower)), self._whole(self._place(found.upper))

    def value(self, index: Tensor) -> Tensor:
        """Return the weights `(*shape)` of indices."""
        return self._whole(self.quantizer.deliver(self._blocks(self._values[index.long()]), self.fit))

    def unrounded(self, index: Tensor) -> Tensor:
        """Return where the grid values of indices lie before a compute dtype rounds them: what latent weights are compared with."""
        return self._whole(self.fit.to_weights(self._blocks(self._values[index.long()])))

    def encode(self, index: Tensor, like: Encoded) -> Encoded:
        """Return `like` with the codes of other indices."""
        return like._replace(codes=grids.to_codes(self._values[index.long()], self.quantizer.format).to(like.codes.device))

    @property
    def _values(self) -> Tensor:
        return torch.tensor(self.quantizer.format.values, dtype=self.fit.scale.dtype, device=self.fit.scale.device)

    def _place(self, values: Tensor) -> Tensor:
        return torch.searchsorted(self._values, values.contiguous()).to(torch.int16)

    def _blocks(self, whole: Tensor) -> Tensor:
        return to_blocks(whole, self.quantizer.block, self.quantizer.axis)

    def _whole(self, blocks: Tensor) -> Tensor:
        return from_blocks(blocks, self.shape, self.quantizer.block, self.quantizer.axis)


def grid(encoded: Encoded, like: Tensor) -> Grid:
    """Return the grid of an encoded weight, in the dtype and on the device of `like`."""
    scale = encoded.scales.reshape(-1, 1)
    if encoded.tensor_scale is not None:
        scale = scale * encoded.tensor_scale
    zeros = None if encoded.zero_points is None else encoded.zero_points.reshape(-1, 1).to(like)
    by_minimum = encoded.quantizer.zero == "minimum"
    fit = Fit(scale.to(like), zero=None if by_minimum else zeros, minimum=zeros if by_minimum else None)
    return Grid(encoded.quantizer, fit, tuple(encoded.codes.shape))
