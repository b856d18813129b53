"""Ranks: which process of how many this one is. Everything in training that depends on rank or world size comes from here.

Without a process group there is one process, and every function here is free. A batch is named by its global rows, so that losses, loss
terms and the order of the data are the same at any world size.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

SETTLE = 0.05  # seconds


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: 0 to size - 1.
        size: how many processes train together.
        device: where this process's model and batches live.
        replicate: whether each holds the whole model (DDP) and not a shard of every weight (FSDP2).
    """

    rank: int
    size: int
    device: torch.device
    replicate: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def rows(self, rows: int) -> range:
        """Return which rows of a global batch are this process's.

        Raises:
            ValueError: the world size does not divide the rows.
        """
        if rows % self.size:
            raise ValueError(
                f"`rows` per step must be a multiple of the number of processes: got {rows} rows for {self.size} processes. "
                "Start another number of them, or change the recipe's `rows`."
            )
        share = rows // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the tensor itself where there is one."""
        if self.size == 1:
            return value
        summed = value.clone()
        distributed.all_reduce(summed)
        return summed

    def alone(self, work: Callable[[], None]) -> None:
        """Have the first process do something while the others wait; where it fails, all fail.

        Raises:
            ValueError: in the others, when the first one raised what it raises here too.
        """
        failure: Exception | None = None
        if self.first:
            try:
                work()
            except Exception as error:
                failure = error
        failed = bool(self.total(torch.tensor(float(failure is not None), device=self.device)))
        if failure is not None:
            raise failure
        if failed:
            raise ValueError(f"process {self.rank} cannot go on: the first one failed, and says why itself.")

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did, while the block runs: NCCL where there are GPUs, one each, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        # gloo's threads free what they summed last, for which they need the interpreter's lock; DDP's reducer, freed a moment later, holds
        # that lock while it waits for them (torch 2.13: hangs at once in a loop of its own, never in 150 rounds with this pause)
        time.sleep(SETTLE)
        distributed.destroy_process_group()


def here(device: str | torch.device | None = None, *, replicate: bool = False) -> Ranks:
    """Return this process: as torch.distributed knows it once its process group stands, else the only one.

    Args:
        device: None takes the current accelerator, or the CPU where there is none.
        replicate: as in `Ranks`.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    together = distributed.is_available() and distributed.is_initialized()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    return Ranks(rank, size, torch.device(device), replicate)


def prepare(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the model on its device, each decoder layer in shards over all processes where there are several; nothing is attached yet."""
    model.to(ranks.device)
    if ranks.size > 1 and not ranks.replicate:
        from torch.distributed.fsdp import fully_shard

        for layer in layers(model):
            fully_shard(layer)
        fully_shard(model)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    """Return a decoder's layers: the members of its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def forward_of(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return what runs forward: the model, or, where every process holds the whole of it, what averages their gradients."""
    if ranks.size == 1 or not ranks.replicate:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=None if ranks.device.type == "cpu" else [ranks.device.index])


@contextmanager
def synchronising(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Run a backward pass whose gradients meet those of the other processes only in the last micro-batch of a step."""
    inner: Any = model
    if hasattr(model, "set_requires_gradient_sync"):
        inner.set_requires_gradient_sync(last)
    with inner.no_sync() if hasattr(model, "no_sync") and not last else nullcontext():
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which this process may hold a part; every process asks at once."""
    gathered: Any = tensor
    entire: Tensor = gathered.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return entire


@torch.no_grad()
def put_(parameter: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a parameter; of one that is shared out, this process's part."""
    placed: Any = parameter
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), placed.device_mesh, placed.placements)
    parameter.copy_(value)
