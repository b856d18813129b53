"""Ranks: which process of how many this one is. Everything in training that depends on rank or world size comes from here.

Without a process group there is one process, and every function here is free. A batch is named by its global rows, so that losses, loss
terms and the order of the data are the same at any world size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: 0 to size - 1.
        size: how many processes train together.
        device: where this process's model and batches live.
    """

    rank: int
    size: int
    device: torch.device

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

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            distributed.barrier()


def here(device: str | torch.device | None = None) -> Ranks:
    """Return this process: as torch.distributed knows it once its process group stands, else the only one.

    Args:
        device: None takes the current accelerator, or the CPU where there is none.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    together = distributed.is_available() and distributed.is_initialized()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    return Ranks(rank, size, torch.device(device))


def prepare(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the model on its device, shared out over all processes where there are several; to be called before anything is attached."""
    return model.to(ranks.device)


@contextmanager
def synchronising(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Run a backward pass whose gradients meet those of the other processes only in the last micro-batch of a step."""
    del model, last
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
