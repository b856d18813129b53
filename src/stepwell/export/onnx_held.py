"""Held: a weight as ONNX files hold it, rows of unsigned codes with a scale and a zero point per block, in whatever operator.

Both forms of an exported weight, `MatMulNBits` and `DequantizeLinear`, multiply by `(code - zero point) * scale` in float32.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from stepwell.quantizers import Encoded

WIDTHS = (2, 4, 8)  # of codes in files
COUNTER = "#"  # operators are named after their parameter and counted: `head.weight#1`, or `in_proj_weight[0:64]#1` for some of its rows
METADATA, VERSION = "stepwell", 1  # key of the file's own description, and its layout
FOLDED = "a neighbour such as a batch norm was folded into it"


class Held(NamedTuple):
    """One weight, its outputs as rows.

    Attributes:
        codes: `(outputs, inputs)` uint8, unsigned; of a convolution all but the first dimension are its inputs.
        scales: `(outputs, blocks)` float32.
        zeros: `(outputs, blocks)` uint8, the codes that stand for zero.
        bits: width of a code in the file.
        stored_zeros: whether zero points are stored; without them all are half the code range.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    bits: int
    stored_zeros: bool

    @property
    def block(self) -> int:
        """Inputs per scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def decode(self) -> NDArray[np.float32]:
        """Return the weight `(outputs, inputs)` in float32, by the operators' own formula."""
        units = self.codes.astype(np.float32) - np.repeat(self.zeros, self.block, axis=1).astype(np.float32)
        return units * np.repeat(self.scales, self.block, axis=1)

    def rows(self, start: int, stop: int) -> "Held":
        """Return some of the outputs."""
        return self._replace(**{part: getattr(self, part)[start:stop] for part in ("codes", "scales", "zeros")})

    def same(self, other: "Held") -> bool:
        """Say whether two hold the same codes, scales and zero points."""
        parts = ((self.codes, other.codes), (self.scales, other.scales), (self.zeros, other.zeros))
        return self.bits == other.bits and all(np.array_equal(one, two) for one, two in parts)


def unholdable(encoded: Encoded, operator: str, widths: tuple[int, ...]) -> str | None:
    """Say why an operator with codes of these widths, integer zero points and float32 scales cannot hold a grid; None where it can."""
    grid, format = encoded.quantizer, encoded.quantizer.format
    if format.levels not in ("symmetric", "full", "affine") or format.bits not in widths:
        names = ", ".join(f"int{bits}" for bits in widths) if len(widths) < 4 else "int2 to int8"
        return f"{operator} holds {names} with levels 'symmetric', 'full' or 'affine', and ternary: got {format}"
    if format.levels == "affine" and grid.zero != "integer":
        return f"{operator} holds integer zero points: got block minima"
    if grid.compute is not None:
        return f"{operator} multiplies scale and code in float32: got compute={grid.compute!r}"
    if not bool((_scales(encoded) == _scales(encoded).float()).all()):
        return f"{operator} stores float32 scales: got float64 scales that float32 does not hold (round the weight in float32)"
    return None


def hold(encoded: Encoded, *, block: int, bits: int) -> Held:
    """Return an encoded weight as rows of unsigned codes.

    Args:
        encoded: a weight for which `unholdable` is None.
        block: inputs per scale in the file: divides the inputs that share one in the grid, whose scale is repeated.
        bits: width of a code in the file, at least the grid's.
    """
    inputs, affine = row_length(encoded), encoded.quantizer.format.levels == "affine"
    moved = encoded.codes.cpu() if encoded.quantizer.axis is None else encoded.codes.cpu().movedim(encoded.quantizer.axis, -1)
    outputs, per_row = encoded.codes.numel() // inputs, inputs // block
    offset = 0 if affine else 2 ** (bits - 1)
    codes = (moved.reshape(outputs, inputs).to(torch.int16) + offset).to(torch.uint8).contiguous().numpy()

    def spread(values: torch.Tensor) -> torch.Tensor:
        """Give every block the value of the block it lies in."""
        return values.reshape(-1, 1).expand(-1, outputs * per_row // values.numel()).reshape(outputs, per_row)

    scales = spread(_scales(encoded).cpu()).to(torch.float32).contiguous().numpy()
    stored = encoded.zero_points is not None
    zeros = spread(encoded.zero_points.cpu()) if encoded.zero_points is not None else torch.full((outputs, per_row), offset)
    return Held(codes, scales, zeros.to(torch.uint8).contiguous().numpy(), bits, stored)


def row_length(encoded: Encoded) -> int:
    """Return how many inputs an output of the weight has."""
    axis, shape = encoded.quantizer.axis, encoded.codes.shape
    if axis is not None:
        return shape[axis]
    return encoded.codes.numel() // shape[0] if len(shape) > 1 else shape[0]


def span(encoded: Encoded) -> int:
    """Return how many inputs of one output share a scale; a scale of the whole weight spans each output's inputs."""
    block = encoded.quantizer.block
    return block if isinstance(block, int) else row_length(encoded)


def name(parameter: str, rows: tuple[int, int] | None, count: int) -> str:
    """Return the name of the `count`-th operator that holds a parameter, or some of its rows.

    >>> name("attention.in_proj_weight", (0, 64), 1)
    'attention.in_proj_weight[0:64]#1'
    """
    part = "" if rows is None else f"[{rows[0]}:{rows[1]}]"
    return f"{parameter}{part}{COUNTER}{count}"


def named(node: str) -> tuple[str, tuple[int, int] | None]:
    """Return the parameter that an operator of this name holds, and which of its rows; None is all.

    >>> named("blocks.0.mlp.weight#2"), named("attention.in_proj_weight[0:64]#1")
    (('blocks.0.mlp.weight', None), ('attention.in_proj_weight', (0, 64)))
    """
    parameter = node.rpartition(COUNTER)[0] or node
    head, _, rows = parameter.removesuffix("]").rpartition("[")
    start, _, stop = rows.partition(":")
    if parameter.endswith("]") and head and start.isdecimal() and stop.isdecimal():
        return head, (int(start), int(stop))
    return parameter, None


def _scales(encoded: Encoded) -> torch.Tensor:
    """Return the scales in weight units, the scale of the scales included."""
    return encoded.scales if encoded.tensor_scale is None else encoded.scales * encoded.tensor_scale
