"""Parity of folders: what transformers loaded, against the model it came from; shared by the checks of each kind of folder."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepwell.export.certificate import Cause, Layer
from stepwell.export.deployed import owners, plain
from stepwell.export.outputs import Compared, Runtime, compare, with_weights
from stepwell.quantizers import Encoded


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, every tied one once."""
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(tensor), name)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if seen[id(tensor)] == name}


def running(loaded: nn.Module) -> Runtime:
    """Return a loaded model as a runtime: float inputs are cast to its dtype."""
    dtype = next((tensor.dtype for tensor in loaded.parameters() if tensor.is_floating_point()), torch.float32)

    def run(inputs: tuple[Tensor, ...]) -> list[Any]:
        cast = tuple(part.to(dtype) if part.is_floating_point() else part for part in inputs)
        return [leaf for leaf in tree_leaves(loaded(*cast)) if isinstance(leaf, Tensor)]

    return run


def float_part(
    model: nn.Module, loaded: nn.Module, encoded: Mapping[str, Encoded], floats: Mapping[str, str], *, coded: Collection[str]
) -> Iterator[Layer]:
    """Yield a row for every encoded weight that was left in float, and one for all that never was encoded.

    Args:
        model: the model that was exported.
        loaded: the one that transformers loaded.
        encoded: the weights that were exported.
        floats: encoded weights that the folder lists as float values, with the reason.
        coded: names of what the folder holds in codes.
    """
    mine, theirs = owners(model), dict(loaded.named_parameters(remove_duplicate=False))
    for name in floats:
        if name in encoded:
            stored = theirs.get(name)
            equal = stored is not None and torch.equal(plain(stored), encoded[name].decode().to(stored.dtype).float())
            yield Layer(name, 0, "float", None, None, equal, floats[name])
    held = {id(mine[name]) for name in encoded}
    known = {name: tensor for name, tensor in parameters_of(model).items() if id(tensor) not in held and name not in coded}
    found = loaded.state_dict(keep_vars=True)
    wrong = [name for name, tensor in known.items() if name not in found or not _as(tensor, found[name])]
    dtypes = sorted({str(found[name].dtype).removeprefix("torch.") for name in known if name in found})
    if known:
        note = f"{wrong[0]} differs" if wrong else ""
        yield Layer(f"float part, {len(known)} tensors", 0, ", ".join(dtypes), None, None, not wrong, note)


def narrow_cause(
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    runtime: Runtime,
    example: tuple[Tensor, ...],
    runs: list[Compared],
    dtype: torch.dtype,
) -> list[Cause]:
    """Return what half-precision arithmetic accounts for, by running the model with its grid weights in that dtype too; none in float32."""
    if dtype == torch.float32:
        return []
    cast = {name: plain(tensor).to(dtype) for name, tensor in parameters_of(model).items() if tensor.is_floating_point()}
    first = {id(tensor): name for name, tensor in parameters_of(model).items()}
    cast.update({first[id(owners(model)[name])]: weight.decode().to(dtype) for name, weight in encoded.items()})
    inner = with_weights(model, cast)

    def reference(inputs: tuple[Tensor, ...]) -> list[Any]:
        return inner(tuple(part.to(dtype) if part.is_floating_point() else part for part in inputs))

    modelled = compare(model, encoded, runtime, example, reference=reference)
    word = str(dtype).removeprefix("torch.")
    what = f"the model with the same grid weights run in {word} too"
    return [Cause(f"{word} arithmetic", what, runs[0].error, modelled[0].error)]


def _as(tensor: Tensor, stored: Tensor) -> bool:
    """Say whether a loaded tensor is the model's, in the dtype it was loaded in."""
    return tensor.shape == stored.shape and torch.equal(tensor.detach().cpu().to(stored.dtype), stored.detach().cpu())
