"""Quantizer: a format, the blocks that share a scale, the rule that fits the scale, and the dtype that stores it.

One frozen record describes a grid completely. Calling it rounds a weight; `bracket` gives the neighbours that every training method is a
function of; `encode` gives the codes and scales that are stored and shipped. Codes and scales are identical in all three.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stepwell import grids, scales, shrink
from stepwell.blocks import Block, block_length, check_block, from_blocks, scale_shape, to_blocks
from stepwell.formats import Format
from stepwell.rounding import Bracket, Rounding
from stepwell.scales import Fit, Rule, ScaleDtype, ScaleRounding, Zero

Compute = Literal["fp16", "bf16"] | None
PIECE = 1 << 17  # weights that are encoded together on a CPU


@dataclass(frozen=True)
class Quantizer:
    """A complete description of a weight grid; build one with `int4()`, `nvfp4()`, `target(..)` and their relatives.

    Attributes:
        format: the grid of element values, in units of the scale.
        block: elements per scale along the contraction dimension; "channel" one scale per output, None one per tensor.
        rule: how a scale follows from a block: "absmax", "mse" (search), or a number that is the scale itself.
        scale_dtype: what the scale is stored in. "e4m3" scales come with one more float32 scale per tensor.
        scale_rounding: how the scale reaches that dtype. "up" never saturates, "floor" is the OCP MX rule.
        zero: what an "affine" grid stores per block: an integer zero point in codes, or the block's minimum as a weight.
        axis: the contraction dimension; None is the last of two, all but the first of more.
        compute: dtype that the runtime rounds `scale * code` to before it multiplies; None keeps the weight's own.
        levels_open: whether the levels were left to the preset's default, so that `quantize_training` may choose them; no part of the grid.
    """

    format: Format
    block: Block = None
    rule: Rule = "absmax"
    scale_dtype: ScaleDtype = "fp32"
    scale_rounding: ScaleRounding = "nearest"
    zero: Zero = "integer"
    axis: int | None = None
    compute: Compute = None
    levels_open: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.format.low > 0:
            raise ValueError(f"`format` must hold zero or both signs: got {self.format}, a grid for scales.")
        check_block(self.block, self.axis)
        scales.check_rule(self.format, self.rule, self.scale_dtype, self.scale_rounding, self.zero)
        if not isinstance(self.rule, str):
            object.__setattr__(self, "rule", float(self.rule))
        if self.compute not in (None, "fp16", "bf16"):
            raise ValueError(f"`compute` must be None, 'fp16' or 'bf16': got {self.compute!r}.")

    def __call__(self, weight: Tensor, *, scale: Tensor | None = None, rounding: Rounding | None = None) -> Tensor:
        """Return the weight on the grid.

        Args:
            weight: `(*shape)`, any float dtype; rounded in float32, or float64 if it is float64.
            scale: `(rows, blocks per row)` scales to use instead of fitting them; each is rounded to the scale dtype. What `scale()`
                returns comes back as it was.
            rounding: None is round to nearest, ties to the even code; or `stochastic(generator)`.

        Returns:
            `(*shape)` in the weight's dtype.

        Raises:
            TypeError: an integer weight, or a rounding that is no function of a bracket.
            ValueError: an empty or non-finite weight, a block that does not divide, scales of another shape, infinite or of a wrong sign.
        """
        blocks, fit, _ = self.prepare(weight, scale)
        rounded = self.snap(blocks, fit) if rounding is None else self.deliver(self._round(blocks, fit, rounding), fit)
        return from_blocks(rounded, tuple(weight.shape), self.block, self.axis).to(weight.dtype)

    def scale(self, weight: Tensor) -> Tensor:
        """Return the fitted scales, `(rows, blocks per row)`, in weight units, with every factor of the scale's storage in them."""
        _, fit, _ = self.prepare(weight, None)
        return fit.scale.reshape(scale_shape(tuple(weight.shape), self.block, self.axis))

    def bracket(self, weight: Tensor, *, scale: Tensor | None = None) -> Bracket:
        """Return the neighbours of every weight and the weight clamped between them, `(*shape)` each, in weight units.

        Where the scale rule saturates, a weight outside the grid is clamped to the outermost value: randomized rounding is then biased by
        that distance.
        """
        blocks, fit, _ = self.prepare(weight, scale)
        found, shape = self.enclose(blocks, fit), tuple(weight.shape)
        assert found.upper_even is not None
        lower, x, upper = (from_blocks(part, shape, self.block, self.axis).to(weight.dtype) for part in found[:3])
        return Bracket(lower, x, upper, from_blocks(found.upper_even, shape, self.block, self.axis))

    def encode(self, weight: Tensor, *, scale: Tensor | None = None, rounding: Rounding | None = None) -> "Encoded":
        """Return the codes and scales that are stored and shipped.

        `encode(w).decode().to(w.dtype)` equals `self(w)` bit for bit; without the cast, for float32 and float64 weights.
        """
        blocks, fit, tensor_scale = self.prepare(weight, scale)
        codes = self._codes(blocks, fit) if rounding is None else grids.to_codes(self._round(blocks, fit, rounding), self.format)
        shape = tuple(weight.shape)
        grouped = scale_shape(shape, self.block, self.axis)
        stored = fit.scale if tensor_scale is None else _factor(fit.scale, tensor_scale)
        zeros = fit.zero if fit.minimum is None else fit.minimum
        return Encoded(
            codes=from_blocks(codes, shape, self.block, self.axis).contiguous(),
            scales=stored.reshape(grouped),
            quantizer=self,
            tensor_scale=tensor_scale,
            zero_points=None if zeros is None else zeros.reshape(grouped),
        )

    # The step path: blocks in, blocks out, nothing checked.

    def fit(self, blocks: Tensor, *, tensor_scale: Tensor | None = None) -> Fit:
        """Return the scale of every block by this quantizer's rule, as it will be stored.

        Args:
            blocks: `(blocks, block)`, float32 or float64.
            tensor_scale: of the whole weight that these blocks are a part of; None takes these for the whole.
        """
        if self.rule == "mse" and self.scale_dtype != "e4m3":
            group = max(1, shrink.PIECE // blocks.shape[1])  # blocks know nothing of each other
            parts = [self._search(blocks[start : start + group]) for start in range(0, max(len(blocks), 1), group)]
            return parts[0] if len(parts) == 1 else Fit.join(parts)
        low, high = scales.extremes(blocks)
        wanted = self._wanted(blocks, low, high)
        if self.scale_dtype == "e4m3" and tensor_scale is None:
            tensor_scale = scales.tensor_scale(wanted.abs().max(), self.format)
        return self._stored(wanted, low, high, tensor_scale)

    def _search(self, blocks: Tensor) -> Fit:
        """Return the scale of every block with the least squared error among shrunken absmax scales."""
        low, high = scales.extremes(blocks)
        wanted = scales.absmax(low, high, self.format, rounding=self.scale_rounding, zero=self.zero)
        factors = torch.tensor(scales.SHRINK, dtype=blocks.dtype, device=blocks.device).reshape(-1, 1, 1)
        trials = self._stored(scales.settle(wanted * factors, self.format), low, high, None)

        def rounded(units: Tensor, fit: Fit) -> Tensor:
            values = grids.round_nearest(units, self.format)
            return values if self.compute is None else fit.to_units(self.deliver(values, fit))

        ends = self.format if self.compute is None and self.format.levels != "affine" else None  # a zero point moves the ends
        return shrink.least(blocks, trials, wanted.masked_fill(wanted == 0, 1), rounded, ends=ends)

    def tensor_scale(self, blocks: Tensor) -> Tensor | None:
        """Return the float32 scale of the scales, 0-dim, where the scale dtype needs one (e4m3), else None."""
        if self.scale_dtype != "e4m3":
            return None
        return scales.tensor_scale(self._wanted(blocks, *scales.extremes(blocks)).abs().max(), self.format)

    def hold(self, scale: Tensor, *, tensor_scale: Tensor | None = None) -> Fit:
        """Return given scales `(blocks, 1)` as they will be stored; grids with zero points follow the weights instead.

        `tensor_scale` is as in `fit`.
        """
        if self.scale_dtype == "e4m3" and tensor_scale is None:
            tensor_scale = scales.tensor_scale(scale.abs().max(), self.format)
        return self._stored(scale, scale, scale, tensor_scale)

    def snap(self, blocks: Tensor, fit: Fit) -> Tensor:
        """Return `(blocks, block)` rounded to nearest, in weight units."""
        return self.deliver(grids.round_nearest(fit.to_units(blocks), self.format), fit)

    def deliver(self, units: Tensor, fit: Fit) -> Tensor:
        """Return grid values `(blocks, block)` as the weights a runtime multiplies with, `compute` rounding included."""
        weights = fit.to_weights(units)
        if self.compute is None:
            return weights
        return weights.to(scales.TORCH_DTYPES[self.compute]).to(weights.dtype)

    def enclose(self, blocks: Tensor, fit: Fit) -> Bracket:
        """Return the bracket of `(blocks, block)` in weight units."""
        lower, _, upper, even = grids.bracket(fit.to_units(blocks), self.format)
        one, two = self.deliver(lower, fit), self.deliver(upper, fit)
        bottom, top = torch.minimum(one, two), torch.maximum(one, two)
        assert even is not None
        flipped = one > two  # a negative scale turns the grid over
        return Bracket(bottom, blocks.clamp(bottom, top), top, even ^ flipped)

    def local(self) -> "Quantizer":
        """Return the same grid for weights that are already `(blocks, block)`: one scale per row, last dimension contracted."""
        return replace(self, block="channel", axis=None)

    def __str__(self) -> str:
        block = {None: "tensor", "channel": "channel"}.get(self.block, f"block {self.block}")  # type: ignore[arg-type]
        rule = f"scale {self.rule:g}" if isinstance(self.rule, float) else self.rule
        extra = "" if self.compute is None else f", computed in {self.compute}"
        axis = "" if self.axis is None else f", axis {self.axis}"
        return f"{self.format} {block}, {rule} {self.scale_dtype} scales{axis}{extra}"

    def prepare(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Fit, Tensor | None]:
        """Check a weight and return its blocks, their fit and the scale of the scales."""
        check_weight(weight)
        block_length(tuple(weight.shape), self.block, self.axis)
        work = weight.detach() if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()
        blocks = to_blocks(work, self.block, self.axis)
        if self.compute == "fp16" and (largest := float(blocks.abs().max())) > torch.finfo(torch.float16).max:
            raise ValueError(f"`compute`='fp16' overflows beyond 65504: got a weight of magnitude {largest:g}. Use 'bf16' or None.")
        if scale is None:
            tensor_scale = self.tensor_scale(blocks)
            return blocks, self.fit(blocks, tensor_scale=tensor_scale), tensor_scale
        wanted = self._given(scale, scale_shape(tuple(weight.shape), self.block, self.axis)).to(blocks)
        tensor_scale = scales.tensor_scale(wanted.abs().max(), self.format) if self.scale_dtype == "e4m3" else None
        return blocks, self._stored(wanted, *scales.extremes(blocks), tensor_scale), tensor_scale

    def _given(self, scale: Tensor, expected: tuple[int, int]) -> Tensor:
        """Return scales that the caller gives as `(blocks, 1)`, or refuse them."""
        if not isinstance(scale, Tensor):
            raise TypeError(f"`scale` must be a tensor of shape {expected}: got {scale!r}. Give a fixed number to the preset instead.")
        if tuple(scale.shape) != expected and not (scale.numel() == expected[0] and expected[1] == 1 and scale.ndim < 2):
            raise ValueError(f"`scale` must hold one value per block: got shape {tuple(scale.shape)}, expected {expected}.")
        wanted = scale.detach().reshape(-1, 1)
        if not bool(wanted.isfinite().all()):
            raise ValueError(f"`scale` must be finite: got {wanted[~wanted.isfinite()][0].item()}.")
        unsigned = self.scale_dtype == "e8m0" or self.format.levels == "affine"
        if unsigned and bool((wanted < 0).any()):
            raise ValueError(f"`scale` must not be negative for {self}: got {wanted.min().item()}.")
        return wanted

    def _wanted(self, blocks: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the scales `(blocks, 1)` by the rule, before they are rounded to the scale dtype."""
        if isinstance(self.rule, float):
            return torch.full_like(low, self.rule)
        if self.rule == "mse" and self.scale_dtype == "e4m3":
            # The tensor scale must follow from the scales (the largest is e4m3's highest value), so they are searched before it is known.
            return replace(self, scale_dtype="fp32", scale_rounding="nearest").fit(blocks).scale
        return scales.absmax(low, high, self.format, rounding=self.scale_rounding, zero=self.zero)

    def _stored(self, wanted: Tensor, low: Tensor, high: Tensor, tensor_scale: Tensor | None) -> Fit:
        """Return unrounded scales `(blocks, 1)` as their dtype holds them, with the zero points that follow."""
        if tensor_scale is None:
            scale = scales.store(wanted, self.scale_dtype, self.scale_rounding)
        else:
            divisor = tensor_scale.masked_fill(tensor_scale == 0, torch.inf)
            scale = scales.store(wanted / divisor, self.scale_dtype, self.scale_rounding) * tensor_scale
        if self.format.levels != "affine":
            return Fit(scale)
        if self.zero == "minimum":
            return Fit(scale, minimum=scales.store(low, self.scale_dtype, self.scale_rounding))
        return Fit(scale, zero=scales.zero_point(low, high, scale, self.format))

    def _codes(self, blocks: Tensor, fit: Fit) -> Tensor:
        """Return the codes `(blocks, block)` of the nearest grid values, piece by piece: what lies in between stays in the cache."""
        codes = torch.empty(blocks.shape, dtype=grids.code_dtype(self.format), device=blocks.device)
        together = max(1, PIECE // blocks.shape[1]) if blocks.device.type == "cpu" else len(blocks)
        for start in range(0, len(blocks), together):
            stop = start + together
            units = fit.rows(start, stop).to_units(blocks[start:stop])
            codes[start:stop] = grids.to_codes(grids.round_nearest(units, self.format), self.format)
        return codes

    def _round(self, blocks: Tensor, fit: Fit, rounding: Rounding) -> Tensor:
        """Return the grid values that a rounding rule picks, in units of the scale."""
        found = grids.bracket(fit.to_units(blocks), self.format)
        if self.compute is not None:
            # the odds are those of the values that the runtime multiplies with, not of the products before they are rounded
            one, two = self.deliver(found.lower, fit), self.deliver(found.upper, fit)
            gap = (two - one).masked_fill(one == two, torch.inf)
            found = found._replace(x=found.lower + ((blocks - one) / gap).clamp_(0, 1) * (found.upper - found.lower))
        if not callable(rounding) or not isinstance(rounded := rounding(found), Tensor):
            raise TypeError(f"`rounding` must be None or a function of a Bracket such as `sw.stochastic(generator)`: got {rounding!r}.")
        return rounded


class Encoded(NamedTuple):
    """A weight as it is stored and shipped.

    Attributes:
        codes: `(*shape)` of the weight; signed integers, or bit patterns of float formats.
        scales: `(rows, blocks per row)`, exactly representable in the quantizer's scale dtype.
        quantizer: the grid.
        tensor_scale: 0-dim scale of the scales (e4m3), or None.
        zero_points: `(rows, blocks per row)` of "affine" grids: codes that stand for zero, or weights of code 0; else None.
    """

    codes: Tensor
    scales: Tensor
    quantizer: Quantizer
    tensor_scale: Tensor | None = None
    zero_points: Tensor | None = None

    def decode(self) -> Tensor:
        """Return the weight `(*shape)` in the scales' dtype: exactly the values that training and the runtime multiply with.

        Raises:
            ValueError: a code that the format does not have.
        """
        q = self.quantizer
        units = to_blocks(grids.from_codes(self.codes, q.format, self.scales.dtype), q.block, q.axis)
        scale = self.scales.reshape(-1, 1)
        if self.tensor_scale is not None:
            scale = scale * self.tensor_scale
        zeros = None if self.zero_points is None else self.zero_points.reshape(-1, 1)
        fit = Fit(scale, minimum=zeros) if q.zero == "minimum" else Fit(scale, zero=zeros)
        return from_blocks(q.deliver(units, fit), tuple(self.codes.shape), q.block, q.axis)


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Refuse what no grid can hold.

    Raises:
        TypeError: not a float16, bfloat16, float32 or float64 tensor.
        ValueError: empty, or NaN or infinite somewhere.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"`{name}` must be a float16, bfloat16, float32 or float64 tensor: got {kind}. Leave this parameter out with `skip=[...]`."
        )
    if not weight.numel():
        raise ValueError(f"`{name}` must have elements: got shape {tuple(weight.shape)}. Leave this parameter out with `skip=[...]`.")
    values = weight.detach()
    if bool(values.sum().isfinite()):  # a NaN or an infinity would be in the sum, which costs a tenth of looking for it
        return
    bad = values[~values.isfinite()]
    if bad.numel():  # else finite numbers that add up to more than the dtype holds
        raise ValueError(
            f"`{name}` must be finite: got {bad.numel()} of {weight.numel()} elements such as {bad[0].item()}. "
            "Find the step that produced them (a loss of NaN, an overflow in half precision) before quantizing."
        )


def _factor(scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the e4m3 scales of effective ones, exactly."""
    divisor = tensor_scale.masked_fill(tensor_scale == 0, torch.inf)
    return scales.store(scale / divisor, "e4m3", "nearest")
