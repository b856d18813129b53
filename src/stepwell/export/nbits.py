"""MatMulNBits: how onnxruntime's operator `com.microsoft.MatMulNBits` holds a matrix, and which grids it can hold.

Rows of outputs, blocks along the inputs. Codes of a block are packed back to back, the first in the lowest bits; so are the zero points of
a row. Without zero points half the code range is subtracted.

Source: the operator's schema in onnxruntime, and its CPU kernel for what the schema leaves open (block lengths, scales as a flat vector).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepwell.export import onnx_held
from stepwell.export.onnx_held import WIDTHS, Held, span
from stepwell.quantizers import Encoded

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
BLOCKS = (16, 32, 64, 128, 256)
FLOAT32, INT8 = 1, 4  # accuracy levels: activations stay float32 inside the kernel, or are rounded to 8 bits per block


def refusal(encoded: Encoded) -> str | None:
    """Say why the operator cannot hold a matrix's grid; None where it can."""
    axis = encoded.quantizer.axis
    if reason := onnx_held.unholdable(encoded, OPERATOR, WIDTHS):
        return reason
    if axis not in (None, 0, 1, -1, -2):
        return f"MatMulNBits needs blocks along the inputs of a matrix: got axis={axis}"
    if _width(encoded) is None:
        blocks = ", ".join(map(str, BLOCKS))
        return f"MatMulNBits has blocks of {blocks} inputs or whole multiples: got one scale for {span(encoded)} inputs"
    return None


def hold(encoded: Encoded) -> Held:
    """Return an encoded matrix as the operator sees it.

    A scale that spans more inputs than the operator's longest block is repeated over several blocks: the grid stays the same.

    Args:
        encoded: a matrix for which `refusal` is None; `(outputs, inputs)`, or `(inputs, outputs)` where the grid's axis is 0.
    """
    width = _width(encoded)
    assert width is not None, "refused grids are not held"
    return onnx_held.hold(encoded, block=width, bits=encoded.quantizer.format.bits)


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
    if bits not in WIDTHS or (zero_points is not None and zero_points.dtype != np.uint8):
        kind = f"bits={bits}" if zero_points is None else f"bits={bits} and {zero_points.dtype} zero points"
        raise ValueError(f"a MatMulNBits node must have 2, 4 or 8 bits and uint8 zero points to be read: got {kind}.")
    blocks = -(-inputs // block) if block > 0 else 0
    if not blocks or inputs % block or codes.size != outputs * blocks * block * bits // 8 or scales.size != outputs * blocks:
        raise ValueError(
            f"a MatMulNBits node of {outputs} outputs, {inputs} inputs, block {block} and {bits} bits does not fit its "
            f"{codes.size} bytes of codes and {scales.size} scales. The file may be damaged."
        )
    unpacked = _unpack(codes.reshape(outputs, blocks, -1), bits)
    if zero_points is None:
        zeros = np.full((outputs, blocks), 2 ** (bits - 1), np.uint8)
    elif zero_points.size != outputs * -(-blocks * bits // 8):
        raise ValueError(
            f"a MatMulNBits node of {outputs} outputs, {blocks} blocks each and {bits} bits does not fit its {zero_points.size} bytes "
            "of zero points. The file may be damaged."
        )
    else:
        zeros = _unpack(zero_points.reshape(outputs, -1), bits)[:, :blocks]
    return Held(unpacked.reshape(outputs, inputs), scales.reshape(outputs, blocks), zeros, bits, zero_points is not None)


def _width(encoded: Encoded) -> int | None:
    """Return the operator's longest block that divides the inputs under one scale, or None."""
    return next((block for block in reversed(BLOCKS) if span(encoded) % block == 0), None)


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
