"""State: what a Run adds to `optimizer.state_dict()` and takes back, so that this dictionary alone resumes a run.

The entries never live in `optimizer.state`: Adam creates its moments only for empty entries, and torch casts what it finds there to the
parameter's dtype. They are added to the dictionary on the way out and removed on the way in.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepwell.run.managed import Managed, like, local
from stepwell.scales import Fit

LATENT, STEP, FIT, OWN = "latent", "method_step", "method_fit_", "method_tensor_"


def indices(optimizer: Optimizer, state_dict: dict[str, Any], managed: Sequence[Managed]) -> Iterator[tuple[int, Managed]]:
    """Yield (index in the state dictionary, record) for the parameters that this optimizer holds."""
    owned = {id(one.parameter): one for one in managed if one.optimizer is optimizer}
    for packed, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(packed["params"], group["params"], strict=True):
            if id(parameter) in owned:
                yield index, owned[id(parameter)]


def add(optimizer: Optimizer, state_dict: dict[str, Any], managed: Sequence[Managed], step: int) -> dict[str, Any]:
    """Return the state dictionary with latent weights, held scales, own tensors and the step count of every managed parameter."""
    state = dict(state_dict["state"])
    for index, one in indices(optimizer, state_dict, managed):
        entry = dict(state.get(index, {}))  # a copy: torch hands out its own dictionary
        entry[STEP] = torch.tensor(float(step))
        if one.latent is not None:
            entry[LATENT] = like(one.parameter, one.latent)
        for key, part in (one.fit._asdict() if one.fit is not None else {}).items():
            if part is not None:
                entry[FIT + key] = part
        entry.update({OWN + key: tensor for key, tensor in one.tensors.items()})
        state[index] = entry
    return {**state_dict, "state": state}


def split(
    optimizer: Optimizer, state_dict: dict[str, Any], managed: Sequence[Managed]
) -> tuple[dict[str, Any], dict[Managed, dict[str, Any]]]:
    """Return the dictionary as the optimizer alone knows it, and our entries by parameter, checked; nothing is changed.

    Raises:
        ValueError: latent weights of another shape, or narrower than the parameter.
    """
    ours: dict[Managed, dict[str, Any]] = {}
    state = {}
    owners = dict(indices(optimizer, state_dict, managed)) if _fits(optimizer, state_dict) else {}
    for index, entry in state_dict["state"].items():
        mine = {key: value for key, value in entry.items() if key in (LATENT, STEP) or key.startswith((FIT, OWN))}
        rest = {key: value for key, value in entry.items() if key not in mine}
        if rest:
            state[index] = rest
        if mine and index in owners:
            _check(owners[index], mine)
            ours[owners[index]] = mine
    return {**state_dict, "state": state}, ours


def restore(one: Managed, entry: dict[str, Any]) -> None:
    """Put loaded entries into a record."""
    if one.latent is not None and LATENT in entry:
        one.latent.copy_(local(entry[LATENT]))
    parts = {key.removeprefix(FIT): value.to(one.weight.device) for key, value in entry.items() if key.startswith(FIT)}
    if parts:
        one.fit = Fit(**parts)
    for key, tensor in one.tensors.items():
        if OWN + key in entry:
            tensor.copy_(entry[OWN + key])


def loaded_step(entries: dict[Managed, dict[str, Any]]) -> int | None:
    """Return the step count that was saved, or None where nothing of ours was."""
    steps = [int(entry[STEP]) for entry in entries.values() if STEP in entry]
    return max(steps, default=None)


def warn_missing(names: Sequence[str]) -> None:
    """Say that a state dictionary held no latent weights for parameters that have them."""
    warnings.warn(
        f"the optimizer state holds no latent weights for {len(names)} parameters such as {names[0]!r}: their current values become the "
        "latent weights. If this resumes a run, it was saved without its `optimizer.state_dict()`.",
        stacklevel=4,
    )


def _fits(optimizer: Optimizer, state_dict: dict[str, Any]) -> bool:
    """Whether the groups agree; if not, torch's own load raises the error for it."""
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    return len(ours) == len(theirs) and all(len(a["params"]) == len(b["params"]) for a, b in zip(ours, theirs, strict=True))


def _check(one: Managed, entry: dict[str, Any]) -> None:
    latent = entry.get(LATENT)
    if latent is None or one.latent is None:
        return
    if tuple(latent.shape) != tuple(one.parameter.shape):
        raise ValueError(f"latent weight of {one.name!r} has shape {tuple(latent.shape)}: expected {tuple(one.parameter.shape)}.")
    if isinstance(latent, Tensor) and torch.finfo(latent.dtype).bits < torch.finfo(one.latent.dtype).bits:
        raise ValueError(
            f"latent weight of {one.name!r} was narrowed to {latent.dtype}, the parameter is {one.latent.dtype}: the run cannot resume "
            "where it stopped. Save `optimizer.state_dict()` without casting it."
        )
