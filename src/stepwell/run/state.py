"""State: what a Run adds to `optimizer.state_dict()` and takes back, so that this dictionary alone resumes a run.

The entries never live in `optimizer.state`: Adam creates its moments only for empty entries, and torch casts what it finds there to the
parameter's dtype. They are added to the dictionary on the way out and removed on the way in. Latent weights of frozen parameters that no
optimizer holds travel with the run's first parameter.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepwell.run.managed import Managed, like, local, rows_like
from stepwell.run.terms import LossTerms, Measured, counts
from stepwell.scales import Fit

LATENT, STEP, FIT, OWN, FROZEN = "latent", "method_step", "method_fit_", "method_tensor_", "method_frozen_"
TERMS = "method_loss_terms"  # as calibrated; zero before that: a checkpoint is read into what is there


def indices(optimizer: Optimizer, state_dict: dict[str, Any], managed: Sequence[Managed]) -> Iterator[tuple[int, Managed]]:
    """Yield (index in the state dictionary, record) for the parameters that this optimizer holds."""
    owned = {id(one.parameter): one for one in managed if one.optimizer is optimizer}
    for index, parameter in _numbered(optimizer, state_dict):
        if id(parameter) in owned:
            yield index, owned[id(parameter)]


def add(optimizer: Optimizer, state_dict: dict[str, Any], managed: Sequence[Managed], step: int, loss_terms: LossTerms) -> dict[str, Any]:
    """Return the state dictionary with latent weights, held scales, own tensors, step count and measured loss terms of every parameter."""
    state = dict(state_dict["state"])
    for index, one in indices(optimizer, state_dict, managed):
        entry = dict(state.get(index, {}))  # a copy: torch hands out its own dictionary
        entry[STEP] = torch.tensor(float(step))
        if counts(one.method):
            entry[TERMS] = torch.tensor(loss_terms if isinstance(loss_terms, Measured) else 0.0, dtype=torch.float64)
        if one.method.deploy is not None:
            entry[LATENT] = _latent(one)
        held = {} if one.fit is None else one.fit._asdict()
        entry.update({FIT + key: rows_like(one, part) for key, part in held.items() if part is not None})
        entry.update({OWN + key: rows_like(one, tensor) for key, tensor in one.tensors.items()})
        if one is _carrier(managed):
            frozen = [other for other in managed if other.optimizer is None and other.method.deploy is not None]
            entry.update({FROZEN + other.name: _latent(other) for other in frozen})
        state[index] = entry
    if not state_dict["state"]:  # torch.distributed.checkpoint takes no state at all, or some for every trained parameter
        for index, parameter in _numbered(optimizer, state_dict):
            if parameter.requires_grad:
                state.setdefault(index, {STEP: torch.tensor(float(step))})
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
    orphans = 0
    for index, entry in state_dict["state"].items():
        mine = {key: value for key, value in entry.items() if key in (LATENT, STEP, TERMS) or key.startswith((FIT, OWN, FROZEN))}
        rest = {key: value for key, value in entry.items() if key not in mine}
        if rest:
            state[index] = rest
        if mine and index in owners:
            _check(owners[index], mine)
            _check_rows(owners[index], mine)
            ours[owners[index]] = mine
        orphans += LATENT in mine and bool(owners) and index not in owners
    if orphans:
        warnings.warn(
            f"the optimizer state holds latent weights for {orphans} parameters that this run does not manage: they are dropped, and the "
            "parameters keep the rounded values that the model holds. Attach the methods that the state was saved under.",
            stacklevel=4,
        )
    return {**state_dict, "state": state}, ours


def restore(one: Managed, entry: dict[str, Any]) -> None:
    """Put loaded entries into a record."""
    if LATENT in entry:  # the method may be another than the one that saved it: without a latent weight it trains the parameter itself
        (one.weight if one.latent is None else one.latent).copy_(local(entry[LATENT]))
    held = {key.removeprefix(FIT): value for key, value in entry.items() if key.startswith(FIT)}
    if held:
        one.fit = Fit(**{key: local(value).reshape(-1, 1).to(one.weight.device) for key, value in held.items()})
    for key, tensor in one.tensors.items():
        if OWN + key in entry:
            tensor.copy_(local(entry[OWN + key]).reshape(tensor.shape))


def frozen_latents(entries: dict[Managed, dict[str, Any]], managed: Sequence[Managed]) -> Iterator[tuple[Managed, Tensor]]:
    """Yield (record, local latent weight) for frozen parameters that no optimizer holds."""
    carried = {key: value for entry in entries.values() for key, value in entry.items() if key.startswith(FROZEN)}
    for one in managed:
        if one.optimizer is None and FROZEN + one.name in carried:
            yield one, local(carried[FROZEN + one.name])


def loaded_step(entries: dict[Managed, dict[str, Any]]) -> int | None:
    """Return the step count that was saved, or None where nothing of ours was."""
    steps = [int(entry[STEP]) for entry in entries.values() if STEP in entry]
    return max(steps, default=None)


def loaded_terms(entries: dict[Managed, dict[str, Any]], told: LossTerms) -> LossTerms:
    """Return the loss terms that a run goes on with: those that were saved, unless somebody has told it others by now."""
    saved = max((float(entry[TERMS]) for entry in entries.values() if TERMS in entry), default=0.0)
    return Measured(saved) if saved > 0 and (told is None or isinstance(told, Measured)) else told


def warn_missing(names: Sequence[str]) -> None:
    """Say that a state dictionary held no latent weights for parameters that have them."""
    warnings.warn(
        f"the optimizer state holds no latent weights for {len(names)} parameters such as {names[0]!r}: they go on from what the model "
        "holds. If this resumes a run, its `optimizer.state_dict()` was not saved with it, or was flattened.",
        stacklevel=4,
    )


def _latent(one: Managed) -> Tensor:
    """Return the latent weight; before the method starts a copy of the weight, as a checkpoint may be read into it."""
    return like(one.parameter, one.weight.clone() if one.latent is None else one.latent)


def _numbered(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    for packed, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        yield from zip(packed["params"], group["params"], strict=True)


def _carrier(managed: Sequence[Managed]) -> Managed | None:
    """Return the record whose entry carries the frozen latent weights."""
    return next((one for one in managed if one.optimizer is not None), None)


def _fits(optimizer: Optimizer, state_dict: dict[str, Any]) -> bool:
    """Whether the groups agree; if not, torch's own load raises the error for it."""
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    return len(ours) == len(theirs) and all(len(a["params"]) == len(b["params"]) for a, b in zip(ours, theirs, strict=True))


def _check(one: Managed, entry: dict[str, Any]) -> None:
    latent = entry.get(LATENT)
    if latent is None:
        return
    if tuple(latent.shape) != tuple(one.parameter.shape):
        raise ValueError(
            f"latent weight of {one.name!r} has shape {tuple(latent.shape)}: expected {tuple(one.parameter.shape)}. "
            "Load the state of a run on this model."
        )
    if torch.finfo(latent.dtype).bits < torch.finfo(one.parameter.dtype).bits:
        raise ValueError(
            f"latent weight of {one.name!r} was narrowed to {latent.dtype}, the parameter is {one.parameter.dtype}: the run cannot resume "
            "where it stopped. Save `optimizer.state_dict()` without casting it."
        )


def _check_rows(one: Managed, entry: dict[str, Any]) -> None:
    blocks = one.blocks(one.weight).shape[0]
    for key, value in entry.items():
        if key.startswith((FIT, OWN)) and local(value).numel() % max(blocks, 1):
            raise ValueError(
                f"{key!r} of {one.name!r} has shape {tuple(value.shape)}, the parameter has {blocks} blocks of {one.quantizer}. "
                "Attach the method that the state was saved under."
            )
