"""Deployed: a user's model, for a moment, as the runtime will see it: encoded weights in place, float32, on the CPU, in evaluation mode."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.quantizers import Encoded


def owners(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under every name it has."""
    return dict(model.named_parameters(remove_duplicate=False))


def check_encoded(model: nn.Module, encoded: Mapping[str, Encoded]) -> None:
    """Refuse encoded weights that are not the model's.

    Raises:
        TypeError: `model` is no module, `encoded` no mapping, or its values are not `Encoded`.
        ValueError: a name the model does not have, or a shape that differs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module: got {type(model).__name__}.")
    if not isinstance(encoded, Mapping):
        raise TypeError(
            f"`encoded` must map parameter names to Encoded weights: got {type(encoded).__name__}. "
            "Give what `run.finalize()` or `ptq.rtn(..)` returned, or `{'name.of.the.weight': encoded}`."
        )
    parameters = owners(model)
    for name, weight in encoded.items():
        if not isinstance(weight, Encoded):
            raise TypeError(f"`encoded` must map parameter names to Encoded weights: got {type(weight).__name__} for {name!r}.")
        if name not in parameters:
            raise ValueError(
                f"`encoded` names {name!r}, which `model` does not have. Its parameters: {', '.join(list(parameters)[:4])}, .."
            )
        if parameters[name].shape != weight.codes.shape:
            raise ValueError(
                f"`encoded` holds {name!r} with shape {tuple(weight.codes.shape)}, but the model's has {tuple(parameters[name].shape)}. "
                "Was it encoded from another model?"
            )


@contextmanager
def deployed(model: nn.Module, encoded: Mapping[str, Encoded]) -> Iterator[nn.Module]:
    """Show the model with `encoded[name].decode()` in place, everything in float32 on the CPU, in evaluation mode.

    The user's tensors are never written: other tensors stand in their places while the block runs, and the originals come back after it,
    with every module's training mode, whatever happens inside.

    Args:
        model: any module.
        encoded: encoded weights by any of their parameter names; empty leaves the weights as they are.
    """
    parameters = owners(model)
    weights = {id(parameters[name]): weight.decode() for name, weight in encoded.items()}
    modules = list(model.modules())
    modes = [module.training for module in modules]
    tables: list[dict[str, Any]] = [table for module in modules for table in (module._parameters, module._buffers)]
    originals = [dict(table) for table in tables]
    stand_ins: dict[int, Tensor] = {}  # by identity, so that what is shared stays shared
    try:
        for table in tables:
            for local, tensor in table.items():
                if tensor is not None:
                    if id(tensor) not in stand_ins:
                        stand_ins[id(tensor)] = _stand_in(tensor, weights.get(id(tensor)))
                    table[local] = stand_ins[id(tensor)]
        yield model.eval()
    finally:
        for table, original in zip(tables, originals, strict=True):
            table.clear()
            table.update(original)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, floats as float32."""
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _stand_in(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """Return what stands in the place of a parameter or buffer: a parameter itself where nothing differs."""
    if not isinstance(tensor, nn.Parameter):
        return plain(tensor).clone()  # some models count or cache in buffers
    value = plain(tensor if weight is None else weight)
    if weight is None and value.dtype == tensor.dtype and value.device == tensor.device:
        return tensor
    return nn.Parameter(value, requires_grad=False)
