"""Noise: how far float32 arithmetic alone moves a model's outputs, whoever computes them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class SinglyRounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute every operation in float64 and round its result to float32 once: float32 with the best possible order of summation.

    The difference to plain float32 is the error of one order of summation; a runtime that sums in another order differs by about as much,
    or twice. Works inside any model, also where the model converts to float32 by itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; those that write in place, return views, are float64 already or have no such version run as they are."""
        kwargs, schema = kwargs or {}, func._schema
        dtypes = {getattr(part, "dtype", part) for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor | torch.dtype)}
        aliasing = schema.is_mutable or any(part.alias_info for part in (*schema.arguments, *schema.returns))
        if aliasing or torch.float32 not in dtypes or torch.float64 in dtypes:
            return func(*args, **kwargs)
        try:
            return tree_map(_narrow, func(*tree_map(_widen, args), **tree_map(_widen, kwargs)))
        except (RuntimeError, NotImplementedError):
            return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _narrow(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value
