"""Blocks: a weight seen as rows of elements that share one scale.

Blocks run along the contraction dimension, the one a matrix product sums over. The last one for a Linear weight `(out, in)`, all but the
first for a convolution `(out, in, kh, kw)`, the first for GPT-2's Conv1D `(in, out)`, the middle one for `(experts, in, out)`.
"""

from typing import Literal

from torch import Tensor

Block = int | Literal["channel"] | None


def check_block(block: Block, axis: int | None) -> None:
    """Refuse block lengths and axes that no weight could have.

    Raises:
        ValueError: a block that is not a positive integer, "channel" or None; an axis that is not an integer or None.
    """
    if not (block is None or block == "channel" or (isinstance(block, int) and not isinstance(block, bool) and block > 0)):
        raise ValueError(f"`block` must be a positive integer, 'channel' or None (one scale per tensor): got {block!r}.")
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise ValueError(f"`axis` must be an integer dimension or None: got {axis!r}.")


def contraction(shape: tuple[int, ...], axis: int | None) -> int:
    """Return the length of the contraction dimension of a weight of this shape."""
    if axis is not None:
        return shape[axis]
    if len(shape) < 2:
        return shape[0] if shape else 1
    length = 1
    for size in shape[1:]:
        length *= size
    return length


def block_length(shape: tuple[int, ...], block: Block, axis: int | None) -> int:
    """Return how many elements share one scale.

    Raises:
        ValueError: an empty shape, an axis the shape does not have, or a block that does not divide the contraction dimension.
    """
    numel = 1
    for size in shape:
        numel *= size
    if not numel:
        raise ValueError(f"a weight must have elements: got shape {shape}. Leave this parameter out with `skip=[...]`.")
    if axis is not None and not -len(shape) <= axis < len(shape):
        raise ValueError(f"`axis` must be a dimension of the weight: got axis={axis} for shape {shape}.")
    if block is None:
        return numel
    length = contraction(shape, axis)
    if block == "channel":
        return length
    if length % block:
        raise ValueError(
            f"`block` must divide the contraction dimension: got block={block} for a weight of shape {shape}, whose contraction dimension "
            f"has {length} elements. Choose a divisor, block='channel', or leave this parameter out with `skip=[...]`."
        )
    return block


def to_blocks(weight: Tensor, block: Block, axis: int | None = None) -> Tensor:
    """Return the weight as `(blocks, block)`, one scale per row; a view wherever the memory layout allows it.

    Args:
        weight: `(*shape)`.
        block: elements per scale along the contraction dimension; "channel" one scale per output, None one per tensor.
        axis: the contraction dimension; None is the last of two, all but the first of more.
    """
    length = block_length(tuple(weight.shape), block, axis)
    if axis is not None and block is not None:
        weight = weight.movedim(axis, -1)
    return weight.reshape(-1, length)


def from_blocks(blocks: Tensor, shape: tuple[int, ...], block: Block, axis: int | None = None) -> Tensor:
    """Undo `to_blocks`: return `(*shape)` from `(blocks, block)`."""
    if axis is None or block is None:
        return blocks.reshape(shape)
    moved = list(shape)
    moved.append(moved.pop(axis))
    return blocks.reshape(moved).movedim(-1, axis)


def scale_shape(shape: tuple[int, ...], block: Block, axis: int | None = None) -> tuple[int, int]:
    """Return `(rows, blocks per row)`, the shape of a weight's scales; `(1, 1)` for one scale per tensor."""
    length = block_length(shape, block, axis)
    if block is None:
        return (1, 1)
    numel = 1
    for size in shape:
        numel *= size
    columns = contraction(shape, axis)
    return (numel // columns, columns // length)
