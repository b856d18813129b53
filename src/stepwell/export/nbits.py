"""MatMulNBits: how onnxruntime's operator `com.microsoft.MatMulNBits` holds a weight, and which grids it can hold.

The operator multiplies by `(code - zero point) * scale`, codes unsigned, rows of outputs, blocks along the inputs. Codes of a block are
packed back to back, the first in the lowest bits; so are the zero points of a row. Without zero points half the code range is subtracted.

Source: the operator's schema in onnxruntime, and its CPU kernel for what the schema leaves open (block lengths, scales as a flat vector).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from stepwell.blocks import to_blocks
from stepwell.quantizers import Encoded

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)
METADATA, VERSION = "stepwell", 1  # key of the file's own description, and its layout
COUNTER = "#"  # operators are named after their parameter and counted: `head.weight#1`
FOLDED = "a neighbour such as a batch norm was folded into it"
FLOAT32_COMPUTE = 1  # accuracy level: activations stay float32 inside the kernel; level 4 would round them to 8 bits


class Held(NamedTuple):
    """One weight as the operator sees it.

    Attributes:
        codes: `(outputs, inputs)` uint8, unsigned.
        scales: `(outputs, blocks)` float32.
        zeros: `(outputs, blocks)` uint8, the codes that stand for zero.
        bits: width of a code.
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
        """Return the weight `(outputs, inputs)` in float32, by the operator's own formula."""
        units = self.codes.astype(np.float32) - np.repeat(self.zeros, self.block, axis=1).astype(np.float32)
        return units * np.repeat(self.scales, self.block, axis=1)


def refusal(encoded: Encoded) -> str | None:
    """Say why the operator cannot hold a matrix's grid; None where it can."""
    grid, format = encoded.quantizer, encoded.quantizer.format
    if format.levels not in ("symmetric", "full", "affine") or format.bits not in BITS or format.name != f"int{format.bits}":
        return f"MatMulNBits holds int4 and int8 with levels 'symmetric', 'full' or 'affine': got {format}"
    if format.levels == "affine" and grid.zero != "integer":
        return "MatMulNBits holds integer zero points: got block minima"
    if grid.compute is not None:
        return f"MatMulNBits multiplies scale and code in float32: got compute={grid.compute!r}"
    if grid.axis not in (None, 0, 1, -1, -2) or (grid.block is None and grid.axis in (0, -2)):
        return f"MatMulNBits needs blocks along the inputs of a matrix: got axis={grid.axis}"
    if not bool((_scales(encoded) == _scales(encoded).float()).all()):
        return "MatMulNBits stores float32 scales: got float64 scales that float32 does not hold (round the weight in float32)"
    if _width(encoded) is None:
        blocks = ", ".join(map(str, BLOCKS))
        return f"MatMulNBits has blocks of {blocks} inputs or whole multiples: got one scale for {_span(encoded)} inputs"
    return None


def hold(encoded: Encoded) -> Held:
    """Return an encoded matrix as the operator sees it.

    A scale that spans more inputs than the operator's longest block is repeated over several blocks: the grid stays the same.

    Args:
        encoded: a matrix for which `refusal` is None; `(outputs, inputs)`, or `(inputs, outputs)` where the grid's axis is 0.
    """
    grid, format = encoded.quantizer, encoded.quantizer.format
    outputs, inputs = encoded.codes.numel() // _inputs(encoded), _inputs(encoded)
    blocks = to_blocks(encoded.codes.cpu(), grid.block, grid.axis)
    width = _width(encoded)
    assert width is not None, "refused grids are not held"
    per_row = inputs // width
    offset = 0 if format.levels == "affine" else 2 ** (format.bits - 1)
    codes = (blocks.to(torch.int16) + offset).to(torch.uint8).reshape(outputs, inputs).numpy()

    def spread(values: torch.Tensor) -> torch.Tensor:
        """Give every operator block the value of the block it lies in."""
        return values.reshape(-1, 1).expand(-1, outputs * per_row // values.numel()).reshape(outputs, per_row)

    scales = spread(_scales(encoded).cpu()).to(torch.float32).contiguous().numpy()
    stored = encoded.zero_points is not None
    zeros = spread(encoded.zero_points.cpu()) if encoded.zero_points is not None else torch.full((outputs, per_row), offset)
    return Held(codes, scales, zeros.to(torch.uint8).contiguous().numpy(), format.bits, stored)


def to_inputs(held: Held) -> dict[str, NDArray[Any]]:
    """Return the operator's constant inputs by role: `codes` `(outputs, blocks, bytes)`, flat `scales`, packed `zero_points` if stored."""
    outputs, inputs = held.codes.shape
    grouped = held.codes.reshape(outputs, inputs // held.block, held.block)
    parts: dict[str, NDArray[Any]] = {"codes": _pack(grouped, held.bits), "scales": held.scales.reshape(-1)}
    if held.stored_zeros:
        parts["zero_points"] = _pack(held.zeros, held.bits).reshape(-1)
    return parts


def from_inputs(
    codes: NDArray[Any], scales: NDArray[Any], zero_points: NDArray[Any] | None, *, outputs: int, inputs: int, bits: int, block: int
) -> Held:
    """Read the operator's constant inputs back, whoever wrote them.

    Raises:
        ValueError: bits the reader does not know, float zero points, or arrays whose sizes do not agree with the node's attributes.
    """
    blocks = -(-inputs // block)
    if bits not in (2, 4, 8) or (zero_points is not None and zero_points.dtype != np.uint8):
        kind = f"bits={bits}" if zero_points is None else f"bits={bits} and {zero_points.dtype} zero points"
        raise ValueError(f"a MatMulNBits node must have 2, 4 or 8 bits and uint8 zero points to be read: got {kind}.")
    if inputs % block or codes.size != outputs * blocks * block * bits // 8 or scales.size != outputs * blocks:
        raise ValueError(
            f"a MatMulNBits node of {outputs} outputs, {inputs} inputs, block {block} and {bits} bits does not fit its "
            f"{codes.size} bytes of codes and {scales.size} scales. The file may be damaged."
        )
    unpacked = _unpack(codes.reshape(outputs, blocks, -1), bits)
    if zero_points is None:
        zeros = np.full((outputs, blocks), 2 ** (bits - 1), np.uint8)
    else:
        zeros = _unpack(zero_points.reshape(outputs, -1), bits)[:, :blocks]
    return Held(unpacked.reshape(outputs, inputs), scales.reshape(outputs, blocks), zeros, bits, zero_points is not None)


def parameter(node: str) -> str:
    """Return the parameter that an operator of this name was written for.

    >>> parameter("blocks.0.mlp.weight#2")
    'blocks.0.mlp.weight'
    """
    return node.rpartition(COUNTER)[0] or node


def _scales(encoded: Encoded) -> torch.Tensor:
    """Return the scales in weight units, the scale of the scales included."""
    return encoded.scales if encoded.tensor_scale is None else encoded.scales * encoded.tensor_scale


def _inputs(encoded: Encoded) -> int:
    """Return the length of the contraction dimension of a matrix."""
    axis = encoded.quantizer.axis
    return encoded.codes.shape[1 if axis is None else axis]


def _span(encoded: Encoded) -> int:
    """Return how many inputs of one output share a scale; a scale of the whole matrix spans each output's inputs."""
    block = encoded.quantizer.block
    return block if isinstance(block, int) else _inputs(encoded)


def _width(encoded: Encoded) -> int | None:
    """Return the operator's longest block that divides the inputs under one scale, or None."""
    return next((block for block in reversed(BLOCKS) if _span(encoded) % block == 0), None)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the last dimension, the first code in the lowest bits; a last byte is filled with zeros."""
    per = 8 // bits
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    grouped = filled.reshape(*codes.shape[:-1], -1, per)
    packed = np.zeros(grouped.shape[:-1], np.uint8)
    for place in range(per):
        packed |= grouped[..., place] << (bits * place)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Undo `_pack`, the filling included."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> places) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)
