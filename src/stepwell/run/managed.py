"""One managed parameter: its method, its latent weight, and its tensors seen as blocks. Only this package knows about shards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stepwell import grids
from stepwell.blocks import block_length, from_blocks, scale_shape, to_blocks
from stepwell.methods.base import Method
from stepwell.quantizers import Encoded, Quantizer, check_weight
from stepwell.scales import Fit

SCALE = "scale"  # name of a method's own tensor that is the scale of every block


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
        begun: whether the method is on for it.
        latent: local latent weight, where the method deploys something else.
        tensors: the method's own tensors, one row per block.
        moved: what scales that carry the latent weights along were last multiplied by, and these with them, `(blocks, 1)`; else None.
        fit: scales that the Run holds instead of refitting them, where the rule is a search.
        groups: process groups that hold the other shards, where a scale spans them; empty elsewhere.
        reach: what all ranks have agreed on there: the tensor's `(1, 2)` lowest and highest weight, or its 0-dim scale of the scales.
        seen: version and address of the parameter's memory after our last write.
        grid: the quantizer of `(blocks, block)` rows.
        place: the optimizer's group and the index within it that hold the parameter.
        owner: the module that holds the parameter, and under which name.
    """

    name: str
    parameter: nn.Parameter
    method: Method
    quantizer: Quantizer
    optimizer: Optimizer | None
    offset: int = 0
    begun: bool = False
    latent: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    moved: Tensor | None = None
    fit: Fit | None = None
    groups: tuple[Any, ...] = ()
    reach: Tensor | None = None
    seen: tuple[int, int] = (-1, -1)
    place: tuple[int, int] = (0, 0)
    owner: tuple[nn.Module, str] | None = None

    def __post_init__(self) -> None:
        self.grid = self.quantizer.local()

    @property
    def group(self) -> Mapping[str, Any]:
        """The optimizer's parameter group that holds this parameter; empty where no optimizer does."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        group, index = self.place  # looking it up costs parameters squared per step; loading a state replaces the groups, not the places
        if group < len(groups) and index < len(groups[group]["params"]) and groups[group]["params"][index] is self.parameter:
            return groups[group]
        for group, held in enumerate(groups):
            for index, parameter in enumerate(held["params"]):
                if parameter is self.parameter:
                    self.place = (group, index)
                    return held
        return {}

    @property
    def weight(self) -> Tensor:
        """The local part of the parameter."""
        return local(self.parameter.detach())

    @property
    def source(self) -> Tensor:
        """The local weight that the method trains: the latent one, where there is one."""
        return self.weight if self.latent is None else self.latent

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return a local tensor of the parameter's shape as `(blocks, block)`; a view where its memory allows."""
        if not tensor.numel():  # an empty shard
            return tensor.reshape(0, block_length(tuple(self.parameter.shape), self.quantizer.block, self.quantizer.axis))
        return to_blocks(tensor, self.quantizer.block, self.quantizer.axis)

    def put_back(self, tensor: Tensor, blocks: Tensor) -> None:
        """Write blocks into the tensor they came from, unless they are a view of it."""
        if blocks.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            tensor.copy_(from_blocks(blocks, tuple(tensor.shape), self.quantizer.block, self.quantizer.axis))

    def unblock(self, blocks: Tensor) -> Tensor:
        """Return `(blocks, block)` as a local tensor of the parameter's shape."""
        return from_blocks(blocks, tuple(self.weight.shape), self.quantizer.block, self.quantizer.axis)

    @property
    def carries(self) -> bool:
        """Whether the scales carry the latent weights along when they move; in half precision most such steps would be rounded away."""
        return self.method.carries and self.latent is not None and wide(self.latent) is self.latent

    def hand_over(self) -> None:
        """Give the optimizer the latent weight, times what its scales were multiplied by where they carry it; the latent itself stays."""
        if self.latent is None:
            return
        if self.moved is None:
            self.weight.copy_(self.latent)
            return
        blocks = self.blocks(self.weight)
        torch.mul(self.blocks(self.latent), self.moved, out=blocks)
        self.put_back(self.weight, blocks)

    def carried(self, weight: Tensor) -> Tensor:
        """Return a new local weight: this one times what the scales that carry it were multiplied by, where they do."""
        found = weight.clone(memory_format=torch.preserve_format)
        if self.moved is not None:
            self.put_back(found, self.blocks(found) * self.moved)
        return found

    @property
    def orphaned(self) -> bool:
        """Whether the model holds another parameter under this name by now."""
        module, local_name = self.owner or (None, "")
        return module is not None and module._parameters.get(local_name) is not self.parameter

    @property
    def fits_apart(self) -> bool:
        """Whether scales are fitted to a whole weight ahead of the pass that rounds it, which fits others itself or has no need to."""
        searched = self.quantizer.rule == "mse" and SCALE not in self.tensors
        return bool(self.groups) or self.quantizer.scale_dtype == "e4m3" or searched

    def held_fit(self, tensor: Tensor | None = None) -> Fit | None:
        """Return scales that rows cannot fit alone: those that are searched or learned, and those with one scale per tensor behind them.

        `tensor` is a local weight, by default the parameter's own value.
        """
        if self.begun and SCALE in self.tensors:
            return self.grid.hold(self.tensors[SCALE], tensor_scale=self.reach)
        if self.begun and self.fit is not None:
            return self.fit
        if self.reach is not None and self.quantizer.block is None:
            return self.grid.fit(self.reach)
        if self.reach is None and self.quantizer.scale_dtype != "e4m3":
            return None
        return self.grid.fit(wide(self.blocks(self.weight if tensor is None else tensor)), tensor_scale=self.reach)

    def refit(self, tensor: Tensor) -> None:
        """Search the scales again for a local weight, where the rule is a search and the method has none of its own."""
        if self.quantizer.rule == "mse" and SCALE not in self.tensors:
            self.fit = self.grid.fit(wide(self.blocks(tensor)))

    def rounded(self) -> Tensor:
        """Return the local weight on its grid: what `encode` decodes to."""
        blocks, fit = wide(self.blocks(self.source)), self.held_fit(self.source)
        return self.unblock(self.grid.snap(blocks, self.grid.fit(blocks) if fit is None else fit))

    def encode(self) -> Encoded:
        """Return the whole parameter's codes and scales, gathered from all shards; a weight that is not finite is refused."""
        shape, whole = tuple(self.parameter.shape), whole_tensor(like(self.parameter, self.source))
        check_weight(whole, self.name)  # gathered first: a rank that stopped at its own shard would leave the others waiting
        if not self.begun or (self.fit is None and SCALE not in self.tensors):
            return self.quantizer.encode(whole)
        held = self.held_fit(self.source)
        assert held is not None
        fit = Fit(*(None if part is None else whole_tensor(rows_like(self, part)).reshape(-1, 1) for part in held))  # type: ignore[arg-type]
        grouped = scale_shape(shape, self.quantizer.block, self.quantizer.axis)
        encoded = self.quantizer.encode(whole, scale=fit.scale.reshape(grouped))
        if fit.zero is None:
            return encoded
        values = grids.round_nearest(fit.to_units(wide(self.blocks(whole))), self.quantizer.format)  # zero points held with the scales
        codes = from_blocks(grids.to_codes(values, self.quantizer.format), shape, self.quantizer.block, self.quantizer.axis)
        return encoded._replace(codes=codes.contiguous(), zero_points=fit.zero.reshape(grouped))

    def follow(self) -> bool:
        """Take the latent weight and all scales along to where the parameter was moved, in its dtype; say whether a latent weight moved."""
        weight, dtype = self.weight, torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        own = self.tensors.items()
        self.tensors = {key: tensor.to(weight.device, dtype if tensor.is_floating_point() else tensor.dtype) for key, tensor in own}
        if self.latent is None or (self.latent.device == weight.device and self.latent.dtype == weight.dtype):
            return False
        self.latent = self.latent.to(weight)
        self.reach = None if self.reach is None else self.reach.to(wide(weight))
        if self.fit is not None:
            self.fit = Fit(*(None if part is None else part.to(weight.device) for part in self.fit))  # type: ignore[arg-type]
        return True

    def note(self) -> None:
        """Remember the parameter's memory as ours."""
        weight = self.weight
        self.seen = (weight._version, weight.data_ptr())

    @property
    def untouched(self) -> bool:
        """Whether nobody has written to the parameter since `note`."""
        weight = self.weight
        return self.seen == (weight._version, weight.data_ptr())


def once(question: Callable[[Managed], bool]) -> Callable[[Managed], bool]:
    """Let a question about a record be answered once, whose method and grid stay what they are."""
    known: WeakKeyDictionary[Managed, bool] = WeakKeyDictionary()

    def answered(one: Managed) -> bool:
        if one not in known:
            known[one] = question(one)
        return known[one]

    return answered


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


def rows_like(one: Managed, part: Tensor) -> Tensor:
    """Return a tensor with one row per local block as `(rows, blocks per row, ..)`, placed like a sharded parameter.

    Whole rows of the parameter lie on one rank, blocks need not split evenly: 3 rows of 5 blocks on two ranks are 10 and 5 blocks. The
    shape is that of the whole at any world size, so that what is saved at one loads at another.
    """
    whole: Any = one.parameter
    blocks, dimension = scale_shape(tuple(whole.shape), one.quantizer.block, one.quantizer.axis), _rows_dimension(whole, one.quantizer)
    length = whole.shape[dimension]
    if blocks[0] * blocks[1] % length:  # one scale for the tensor
        return part
    shape = (length, blocks[0] * blocks[1] // length, *part.shape[1:])
    rows = part.reshape(one.weight.shape[dimension], *shape[1:])
    if not groups_of(one.parameter):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(0) if placement.is_shard() else placement for placement in whole.placements]
    return DTensor.from_local(rows, whole.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def whole_tensor(placed: Tensor) -> Tensor:
    """Return the whole of a tensor, gathered where every rank holds a part."""
    gathered: Any = placed
    whole: Tensor = gathered.full_tensor() if hasattr(placed, "full_tensor") else placed
    return whole


def wide(blocks: Tensor) -> Tensor:
    """Return half-precision blocks in float32; others as they are."""
    return blocks if blocks.dtype in (torch.float32, torch.float64) else blocks.float()


def groups_of(parameter: Tensor) -> tuple[Any, ...]:
    """Return the process groups, one per mesh dimension, that a parameter's shards are spread over; empty where it is whole."""
    if not hasattr(parameter, "to_local"):
        return ()
    whole: Any = parameter
    return tuple(whole.device_mesh.get_group(k) for k, placement in enumerate(whole.placements) if not placement.is_replicate())


def shard_offset(parameter: Tensor, quantizer: Quantizer, name: str) -> int:
    """Return the index of the local shard's first element, as blocks lie one after the other.

    Raises:
        ValueError: a shard that cuts blocks.
    """
    if not groups_of(parameter):
        return 0
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole: Any = parameter
    rows = _rows_dimension(parameter, quantizer)
    if not all(isinstance(placement, Replicate) or placement == Shard(rows) for placement in whole.placements):
        raise ValueError(
            f"{name!r} of shape {tuple(whole.shape)} is sharded as {whole.placements}, which cuts its blocks. Shard it along dimension "
            f"{rows}, as in `fully_shard(layer, shard_placement_fn=lambda parameter: Shard({rows}))`."
        )
    shape, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    return int(offset[rows]) * (parameter.numel() // parameter.shape[rows]) if shape else 0


def _rows_dimension(parameter: Tensor, quantizer: Quantizer) -> int:
    """Return the dimension whose indices follow each other when the blocks do: the first that is not contracted."""
    return 1 if quantizer.axis is not None and quantizer.axis % parameter.ndim == 0 and parameter.ndim > 1 else 0


def located(quantizer: Quantizer, axis: int | None) -> Quantizer:
    """Return the quantizer with the parameter's contraction dimension, unless it names one itself."""
    return quantizer if quantizer.axis is not None or axis is None else replace(quantizer, axis=axis)
