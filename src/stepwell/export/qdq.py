"""QDQ: how ONNX's operator `DequantizeLinear` holds a weight, and which grids it can hold.

The operator turns integers of 2, 4 or 8 bits into float32, and whatever comes after it computes as if the weight were there: a matrix
product, a convolution, a lookup. Codes without zero points are signed, codes with them unsigned. Narrower codes are stored in the next
wider type: 3 bits take 4. Blocks lie along one axis, so that a convolution's blocks are held as rows and reshaped.

Source: ONNX operators, `DequantizeLinear` at opset 21 (4 bits, blocks) and 25 (2 bits).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepwell.export import onnx_held
from stepwell.export.onnx_held import WIDTHS, Held, span
from stepwell.quantizers import Encoded

OPERATOR = "DequantizeLinear"
OPSET, OPSET_TWO_BITS = 21, 25
OPTION = "session.qdq_matmulnbits_accuracy_level"  # of onnxruntime, which fuses DequantizeLinear and a product into MatMulNBits


class Parts(NamedTuple):
    """The operator's constant inputs and attributes.

    Attributes:
        codes: integers of a narrow type, in the layout that the graph reads.
        scales: float32, one per index of `axis`, or one per block along it.
        zeros: as the scales, in the codes' type; None where all are zero.
        axis: that the scales belong to.
        block: codes along the axis that share a scale; 0 for one scale per index.
    """

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    zeros: NDArray[Any] | None
    axis: int
    block: int


def refusal(encoded: Encoded) -> str | None:
    """Say why the operator cannot hold a weight's grid; None where it can."""
    return onnx_held.unholdable(encoded, OPERATOR, tuple(range(2, 9)))


def hold(encoded: Encoded) -> Held:
    """Return an encoded weight as the operator sees it: rows of outputs, in the narrowest type that holds its codes.

    Args:
        encoded: a weight for which `refusal` is None.
    """
    bits = next(width for width in WIDTHS if width >= encoded.quantizer.format.bits)
    return onnx_held.hold(encoded, block=span(encoded), bits=bits)


def to_parts(held: Held, *, flipped: bool, blocks: bool = False) -> Parts:
    """Return the operator's inputs for a weight that the graph reads as `(outputs, inputs)`, or flipped as `(inputs, outputs)`.

    Args:
        held: the weight.
        flipped: which of the two.
        blocks: whether a single scale per output is written as one of a block that is as long as the row.
    """
    kind = _kind(held)
    offset = 0 if held.stored_zeros else 2 ** (held.bits - 1)
    codes = (held.codes.astype(np.int16) - offset).astype(kind)
    zeros = held.zeros.astype(kind) if held.stored_zeros else None
    single = held.scales.shape[1] == 1 and not blocks

    def place(values: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(values[:, 0] if single else values.T if flipped else values)

    axis = int(single == flipped)  # scales of outputs lie along the rows, of blocks along the columns; flipped the other way round
    whole = np.ascontiguousarray(codes.T if flipped else codes)
    return Parts(whole, place(held.scales), None if zeros is None else place(zeros), axis, 0 if single else held.block)


def from_parts(parts: Parts) -> Held:
    """Read the operator's inputs back as rows of outputs, whoever wrote them.

    Raises:
        ValueError: a type the reader does not know, or arrays whose shapes do not agree.
    """
    codes, scales, zeros, axis, block = parts
    name = codes.dtype.name
    if name not in [f"{sign}int{bits}" for bits in WIDTHS for sign in ("", "u")] or scales.dtype != np.float32:
        raise ValueError(f"a DequantizeLinear node must have integers of 2, 4 or 8 bits and float32 scales: got {name}, {scales.dtype}.")
    shape, fits = list(codes.shape), -codes.ndim <= axis < codes.ndim
    if fits and block:
        shape[axis] = -(-shape[axis] // block)
        fits = codes.shape[axis] % block == 0 and list(scales.shape) == shape
    elif fits and scales.ndim:
        fits = scales.shape == (codes.shape[axis],)
    if not fits or (zeros is not None and zeros.shape != scales.shape):
        raise ValueError(
            f"a DequantizeLinear node with codes of shape {codes.shape}, axis {axis} and block {block} does not fit its scales of shape "
            f"{scales.shape}" + ("" if zeros is None else f" and zero points of shape {zeros.shape}") + ". The file may be damaged."
        )
    signed, bits = not name.startswith("u"), int(name.partition("int")[2])
    offset = 2 ** (bits - 1) if signed else 0
    rows = _rows(codes.astype(np.int16) + offset, parts).astype(np.uint8)

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        """Return scales or zero points as `(outputs, blocks)`."""
        return np.ascontiguousarray(_rows(values, parts) if block else np.broadcast_to(values.reshape(-1, 1), (len(rows), 1)))

    whole = spread(scales)
    held_zeros = np.full(whole.shape, offset, np.uint8) if zeros is None else spread(zeros.astype(np.int16) + offset).astype(np.uint8)
    return Held(rows, whole, held_zeros, bits, zeros is not None)


def _rows(values: NDArray[Any], parts: Parts) -> NDArray[Any]:
    """Return an array as rows of outputs: the axis of blocks becomes the columns, the axis of single scales the rows."""
    if values.ndim < 2:
        return values.reshape(1, -1)
    moved = np.moveaxis(values, parts.axis, -1) if parts.block else np.moveaxis(values, parts.axis if parts.scales.ndim else 0, 0)
    return moved.reshape(-1, moved.shape[-1]) if parts.block else moved.reshape(len(moved), -1)


def _kind(held: Held) -> Any:
    """Return the narrow integer type of a weight's codes."""
    import ml_dtypes

    if held.bits == 8:
        return np.dtype(np.uint8 if held.stored_zeros else np.int8)
    return np.dtype(getattr(ml_dtypes, f"{'u' if held.stored_zeros else ''}int{held.bits}"))
