"""Held: how many bytes of tensors are alive at once, for tests that bound memory."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Sees the result of every operation, those of a backward pass included; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [one.untyped_storage() for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        for storage in made:
            if storage._cdata not in before:  # else a view, or a tensor that was written in place
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if made:
            self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
