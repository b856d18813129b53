"""One managed parameter: its method, its latent weight, and its tensors seen as blocks. Only this package knows about shards."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stepwell.blocks import from_blocks, to_blocks
from stepwell.methods.base import Method
from stepwell.quantizers import Quantizer
from stepwell.scales import Fit


@dataclass(eq=False)
class Managed:
    """State of one parameter under a method.

    Attributes:
        name: the parameter's name in the model.
        parameter: what the model holds; a DTensor where it is sharded.
        method: how it is trained.
        quantizer: the grid, with the parameter's contraction dimension.
        optimizer: who steps it; None for a frozen parameter that no optimizer holds.
        offset: index of the local shard's first element within the whole parameter.
        latent: local latent weight, where the method deploys something else.
        tensors: the method's own tensors, one row per block.
        fit: scales that the Run holds instead of refitting them, where the rule is a search.
        seen: version and address of the parameter's memory after our last write.
        grid: the quantizer of `(blocks, block)` rows.
        place: index of the optimizer's parameter group.
    """

    name: str
    parameter: nn.Parameter
    method: Method
    quantizer: Quantizer
    optimizer: Optimizer | None
    offset: int = 0
    latent: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fit: Fit | None = None
    seen: tuple[int, int] = (-1, -1)

    def __post_init__(self) -> None:
        self.grid = self.quantizer.local()
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        # the place, not the group: load_state_dict puts new dictionaries into the old places
        self.place = next((k for k, group in enumerate(groups) if any(held is self.parameter for held in group["params"])), -1)

    @property
    def group(self) -> Mapping[str, Any]:
        """The optimizer's parameter group that holds this parameter; empty where no optimizer does."""
        if self.optimizer is None:
            return {}
        group: Mapping[str, Any] = self.optimizer.param_groups[self.place]
        return group

    @property
    def weight(self) -> Tensor:
        """The local part of the parameter."""
        return local(self.parameter.detach())

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return a local tensor of the parameter's shape as `(blocks, block)`; a view where its memory allows."""
        return to_blocks(tensor, self.quantizer.block, self.quantizer.axis)

    def put_back(self, tensor: Tensor, blocks: Tensor) -> None:
        """Write blocks into the tensor they came from, unless they are a view of it."""
        if blocks.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            tensor.copy_(from_blocks(blocks, tuple(tensor.shape), self.quantizer.block, self.quantizer.axis))

    def held_fit(self, blocks: Tensor) -> Fit | None:
        """Return scales that rows cannot fit alone: those the Run holds, and those with one scale per tensor behind them."""
        if self.fit is not None or self.quantizer.scale_dtype != "e4m3":
            return self.fit
        return self.grid.fit(blocks, tensor_scale=self.grid.tensor_scale(blocks))

    def refit(self) -> None:
        """Search the scales again, where the rule is a search."""
        if self.quantizer.rule == "mse":
            source = wide(self.blocks(self.weight if self.latent is None else self.latent))
            self.fit = self.grid.fit(source, tensor_scale=self.grid.tensor_scale(source))

    def note(self) -> None:
        """Remember the parameter's memory as ours."""
        weight = self.weight
        self.seen = (weight._version, weight.data_ptr())

    @property
    def untouched(self) -> bool:
        """Whether nobody has written to the parameter since `note`."""
        weight = self.weight
        return self.seen == (weight._version, weight.data_ptr())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """Return a local tensor with the placement of a parameter."""
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def whole_tensor(parameter: Tensor, part: Tensor) -> Tensor:
    """Gather the whole tensor of which every rank holds a part, placed like a parameter."""
    gathered: Any = like(parameter, part)
    whole: Tensor = gathered.full_tensor()
    return whole


def wide(blocks: Tensor) -> Tensor:
    """Return half-precision blocks in float32; others as they are."""
    return blocks if blocks.dtype in (torch.float32, torch.float64) else blocks.float()


def shard_offset(parameter: Tensor, quantizer: Quantizer, name: str) -> int:
    """Return the index of the local shard's first element.

    Raises:
        ValueError: a shard that cuts blocks or tensor-wide scales.
    """
    if not hasattr(parameter, "to_local"):
        return 0
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole: Any = parameter
    if all(isinstance(placement, Replicate) for placement in whole.placements):
        return 0
    rows = quantizer.axis is None or quantizer.axis % parameter.ndim != 0
    by_rows = all(isinstance(placement, Replicate) or placement == Shard(0) for placement in whole.placements)
    if not (rows and by_rows):
        raise ValueError(
            f"{name!r} is sharded as {whole.placements}, which cuts its blocks. Shard it along a dimension that is not contracted."
        )
    if quantizer.block is None or quantizer.scale_dtype == "e4m3":
        raise ValueError(f"{name!r} is sharded, but {quantizer} needs one scale for the whole tensor. Use blocks with their own scales.")
    shape, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    return int(offset[0]) * (parameter.numel() // parameter.shape[0]) if shape else 0


def located(quantizer: Quantizer, axis: int | None) -> Quantizer:
    """Return the quantizer with the parameter's contraction dimension, unless it names one itself."""
    return quantizer if quantizer.axis is not None or axis is None else replace(quantizer, axis=axis)
