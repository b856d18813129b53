"""Sequential rounding of one weight: each column is rounded around the optimum that the columns before it leave for it.

This is GPTQ's loop for one layer (Frantar et al., arXiv:2210.17323), which equals Babai's nearest plane on the lattice of the grid with the
layer's Hessian as metric (arXiv:2507.18553). The published loop pushes every error onto the columns to come, with a factor of the inverse
Hessian; here every column pulls what concerns it from the errors made so far, which needs no inverse and touches less memory.
Symbols: H = hessian = U U^T with U upper triangular, W = weight (columns w_j), Q = rounded weight, E = Q - W.
Column j is rounded at w_j - sum_{i<j} e_i U_ij / U_jj.
Differs from the published code: scales are fitted to the weight before the loop and stay; a column without any input is rounded like the
others instead of set to zero.
"""

import math
import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stepwell import grids, scales
from stepwell.blocks import block_length, from_blocks, scale_shape, to_blocks
from stepwell.quantizers import Encoded, Quantizer
from stepwell.scales import Fit

Order = Literal["natural", "activation"]
PANEL = 64  # columns between two matrix products
FIRST_DAMPING, MOST_DAMPING = 1e-6, 1.0


def sequential(
    weight: Tensor,
    hessian: Tensor,
    quantizer: Quantizer,
    *,
    damping: float = 0.01,
    order: Order = "natural",
    scale: Tensor | None = None,
    name: str = "weight",
) -> Encoded:
    """Return a weight rounded column by column so that `sum (q - w)^T H (q - w)` over its rows stays small.

    Args:
        weight: `(*shape)`; its contraction dimension gives the columns.
        hessian: `(columns, columns)`, the mean of `x x^T` over inputs x, in any unit; `(groups, columns, columns)` for a weight whose rows
            see different inputs, group by group.
        quantizer: the grid.
        damping: added to the diagonal, as a share of its mean. Where the Hessian is still singular, more is taken, with a warning.
        order: "natural", or "activation": columns of large diagonal first. Scales belong to the columns as stored in both.
        scale: `(rows, blocks per row)` scales, for example from `scale_search`; None fits them to the weight.
        name: what the weight is called in warnings and errors.

    Returns:
        Codes and scales; `decode()` gives the rounded weight.

    Raises:
        ValueError: a Hessian of another shape or not finite, damping that is negative or not finite, an unknown order.
    """
    check_options(damping, order)
    blocks, fit, tensor_scale = quantizer.prepare(weight, scale)
    shape, axis = tuple(weight.shape), quantizer.axis
    columns = to_blocks(from_blocks(blocks, shape, quantizer.block, axis), "channel", axis).T.contiguous()
    hessians = hessian.detach().to(columns).reshape(-1, *hessian.shape[-2:])
    count, each = len(hessians), columns.shape[1] // max(len(hessians), 1)
    if tuple(hessian.shape[-2:]) != (len(columns),) * 2 or hessian.ndim > 3 or count * each != columns.shape[1]:
        raise ValueError(f"`hessian` of {name!r} must be {(len(columns),) * 2} for weight {shape}: got {tuple(hessian.shape)}.")
    length = len(columns) if quantizer.block is None else block_length(shape, quantizer.block, axis)
    values = torch.empty_like(columns)
    for group, matrix in enumerate(hessians):
        part = slice(group * each, (group + 1) * each)
        fits = _by_block(fit, len(columns) // length, None if quantizer.block is None else part)
        if order == "natural":
            layer = _Layer(columns[:, part], _factor(matrix, damping, name), quantizer, fits)
            values[:, part] = _loop(layer, [column // length for column in range(len(columns))])
        else:
            sequence = matrix.diagonal().argsort(descending=True, stable=True)
            layer = _Layer(columns[sequence, part], _factor(matrix[sequence][:, sequence], damping, name), quantizer, fits)
            values[sequence, part] = _loop(layer, (sequence // length).tolist())
    return _encoded(from_blocks(values.T.contiguous(), shape, "channel", axis), fit, tensor_scale, quantizer)


def check_options(damping: float, order: str) -> None:
    """Raise unless damping is a finite number, 0 or more, and the order is known."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"`damping` must be a finite number, 0 or more: got {damping!r}. Usual is 0.01.")
    if order not in get_args(Order):
        raise ValueError(f"`order` must be 'natural' or 'activation': got {order!r}.")


class _Layer(NamedTuple):
    """One loop's input: W^T `(columns, rows)` and U in the order of rounding, the grid, and the fit of each block of columns."""

    columns: Tensor
    factor: Tensor
    quantizer: Quantizer
    fits: list[Fit]


def _by_block(fit: Fit, count: int, part: slice | None) -> list[Fit]:
    """Return the fit of every block of columns, `(rows,)` each, for a part of the rows; one for all where the scale is the tensor's."""
    if part is None:
        return [Fit(*(None if field is None else field.reshape(1) for field in fit))]  # type: ignore[arg-type]
    fields = [None if field is None else field.reshape(-1, count)[part].T.contiguous() for field in fit]
    return [Fit(*(None if field is None else field[block] for field in fields)) for block in range(count)]  # type: ignore[arg-type]


def _loop(layer: _Layer, owners: list[int]) -> Tensor:
    """Return the grid values of all columns, `(columns, rows)` in units of the scale; `owners` names each column's block."""
    columns, factor, quantizer, fits = layer
    divisors = [fit.scale.masked_fill(fit.scale == 0, torch.inf) for fit in fits]
    pull = factor / factor.diagonal()
    values, errors = [], torch.zeros_like(columns)
    for start in range(0, len(columns), PANEL):
        panel = slice(start, start + PANEL)
        wanted = torch.addmm(columns[panel], pull[:start, panel].T, errors[:start], alpha=-1)
        # a column is a handful of small operations, so all slicing is done once per panel; errors to come are zero
        made, rows = errors[panel].T, pull[panel, panel].T.contiguous()
        for target, row, column, error, owner in zip(wanted, rows, columns[panel], errors[panel], owners[panel], strict=True):
            fit = fits[owner]
            target = torch.addmv(target, made, row, alpha=-1)
            units = (target if fit.minimum is None else target - fit.minimum) / divisors[owner]
            value = grids.round_nearest(units if fit.zero is None else units + fit.zero, quantizer.format)
            torch.sub(quantizer.deliver(value, fit), column, out=error)
            values.append(value)
    return torch.stack(values)


def _encoded(values: Tensor, fit: Fit, tensor_scale: Tensor | None, quantizer: Quantizer) -> Encoded:
    """Return grid values `(*shape)` in units of the scale, with their scales, as they are stored."""
    grouped = scale_shape(tuple(values.shape), quantizer.block, quantizer.axis)
    stored, zeros = fit.scale, fit.zero if fit.minimum is None else fit.minimum
    if tensor_scale is not None:
        stored = scales.store(stored / tensor_scale.masked_fill(tensor_scale == 0, torch.inf), quantizer.scale_dtype, "nearest")
    return Encoded(
        grids.to_codes(values, quantizer.format).contiguous(),
        stored.reshape(grouped),
        quantizer,
        tensor_scale,
        None if zeros is None else zeros.reshape(grouped),
    )


def _factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Return U, upper triangular with U U^T = H + damping * mean(diagonal) I; more damping where that is not positive definite."""
    mean = hessian.diagonal().mean()
    if not bool(hessian.sum().isfinite()):
        raise ValueError(
            f"`hessian` of {name!r} must be finite: got {mean.item()} as the mean of its diagonal. Check the calibration data."
        )
    if not mean > 0:
        warnings.warn(f"the Hessian of {name!r} is zero: its inputs were all zero, so it is rounded to nearest.", stacklevel=4)
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    flipped, share = hessian.flip(0, 1), damping
    while True:
        damped = flipped.clone()
        damped.diagonal().add_(share * mean)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        share = max(10 * share, FIRST_DAMPING)
        if share > MOST_DAMPING:
            raise ValueError(
                f"`hessian` of {name!r} must be positive semidefinite: got one that damping of {share / 10:g} does not repair."
            )
    if share > damping:
        warnings.warn(f"the Hessian of {name!r} is singular at damping {damping:g}: it was damped by {share:g}.", stacklevel=4)
    return lower.flip(0, 1)
