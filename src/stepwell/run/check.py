"""Checks of `attach`: everything that can be wrong is found before anything is changed."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stepwell.blocks import block_length
from stepwell.methods.base import Curvature, Method
from stepwell.quantizers import check_weight
from stepwell.run import state
from stepwell.run.managed import Managed, groups_of, local, located, shard_offset
from stepwell.run.moments import EXACT, exact, reads_moments
from stepwell.run.sharding import check_spanning
from stepwell.selection import Row, select


def optimizers_of(given: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """Return the optimizers as a list, checked."""
    found: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch optimizer or a list of them: got {type(optimizer).__name__}.")
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        if hooks is None:
            raise TypeError(
                f"`optimizer`: this {type(optimizer).__name__} has no step hooks of its own, as wrappers have that skip "
                "`Optimizer.__init__`. Give the optimizer inside it (often `.optimizer`), or attach before it is wrapped."
            )
        if any(state.LATENT in entry or state.STEP in entry for entry in optimizer.state.values()):
            raise ValueError(
                f"`optimizer`: this {type(optimizer).__name__} was loaded from a run's state before `attach`, which would lose the latent "
                "weights. Build, attach, load, in this order."
            )
        if has_run(optimizer):
            raise ValueError(
                f"`optimizer`: this {type(optimizer).__name__} already has a run. Call its `finalize()` or `detach()` first, "
                "or give all methods in one mapping: `attach(model, {'*.mlp.*': ..., '*': ...}, optimizer)`."
            )
    if not found:
        raise ValueError("`optimizer` must hold at least one optimizer: got an empty list.")
    if len(set(map(id, found))) < len(found):
        raise ValueError(f"`optimizer` lists one {type(found[0]).__name__} twice. Give every optimizer once.")
    return found


def has_run(optimizer: Optimizer) -> bool:
    """Whether a run lives on an optimizer."""
    return any(getattr(hook, "__module__", "").startswith("stepwell.") for hook in optimizer._optimizer_step_pre_hooks.values())


def managed_of(
    model: nn.Module, method: Method | Mapping[str, Method | None], optimizers: Sequence[Optimizer], skip: Sequence[str]
) -> list[Managed]:
    """Return a record for every selected parameter.

    Raises:
        ValueError: nothing selected; a weight that no grid can hold; a trained parameter that no optimizer holds; a method that the
            optimizer cannot serve.
        TypeError: something that is no method, or an integer weight.
    """
    for given in method.values() if isinstance(method, Mapping) else [method]:
        if given is not None and not isinstance(given, Method):
            raise TypeError(
                f"`method` must be a method such as `ste(int4())`, or a mapping to methods: got {type(given).__name__} {given!r}."
            )
    selection = select(model, method, skip=skip)
    if not selection.chosen:
        raise ValueError(f"nothing is selected, so there is nothing to quantize:\n{selection}")
    holders: dict[int, list[Optimizer]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                holders.setdefault(id(parameter), []).append(optimizer)
    found = [_managed(row, holders.get(id(row.parameter), [])) for row in selection.chosen]
    for one in found:
        path, _, local_name = one.name.rpartition(".")
        one.owner = (model.get_submodule(path), local_name)
    _warn_mixed_decay(found)
    narrow = [one.name for one in found if one.parameter.dtype in (torch.bfloat16, torch.float16) and one.parameter.requires_grad]
    if narrow:
        warnings.warn(
            f"{len(narrow)} parameters such as {narrow[0]!r} are in half precision: optimizer updates below its resolution "
            "are lost, as in plain training. Keep float32 parameters and train under autocast to avoid it.",
            stacklevel=3,
        )
    return found


def _managed(row: Row[Method], holders: Sequence[Optimizer]) -> Managed:
    """Check one parameter."""
    name, parameter, method = row.name, row.parameter, row.choice
    optimizer = holders[0] if holders else None
    assert method is not None
    if parameter.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values yet. Materialize and load the model before `attach`.")
    quantizer = located(method.quantizer, row.axis)
    if local(parameter.detach()).numel():
        check_weight(local(parameter.detach()), name)
    try:
        block_length(tuple(parameter.shape), quantizer.block, quantizer.axis)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    if parameter.requires_grad and optimizer is None:
        raise ValueError(
            f"{name!r} is selected and trained, but no given optimizer holds it. "
            f"Give every optimizer in a list, or leave it out with `skip=[{name!r}]`."
        )
    if len(holders) > 1:
        raise ValueError(f"{name!r} is held by {len(holders)} optimizers: each would undo the other's step. Leave it in one of them.")
    if method.curvature is not None:
        _check_curvature(name, method.curvature, parameter)
    if optimizer is not None and reads_moments(method):
        _check_moments(name, method, optimizer, parameter)
    offset = shard_offset(parameter, quantizer, name)
    spans = quantizer.block is None or quantizer.scale_dtype == "e4m3"
    one = Managed(name, parameter, method, quantizer, optimizer, offset=offset, groups=groups_of(parameter) if spans else ())
    check_spanning(one)
    return one


def _check_curvature(name: str, curvature: Curvature, parameter: nn.Parameter) -> None:
    """Refuse curvature that is missing, of another shape, negative or not finite; a function is asked once."""
    if isinstance(curvature, Mapping) and name not in curvature:
        raise ValueError(f"`curvature` holds nothing for {name!r}. Add it, or leave the parameter out with `skip=[{name!r}]`.")
    given = curvature[name] if isinstance(curvature, Mapping) else curvature(name)
    if not isinstance(given, Tensor) or given.shape != parameter.shape:
        came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"`curvature` of {name!r} must be a tensor of shape {tuple(parameter.shape)}: got {came}.")
    wrong = local(given.detach())[~((local(given.detach()) >= 0) & local(given.detach()).isfinite())]
    if wrong.numel():
        raise ValueError(
            f"`curvature` of {name!r} must be finite and not negative: got {wrong[0].item()}. Use a Fisher or Gauss-Newton diagonal."
        )


def _check_moments(name: str, method: Method, optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Refuse a method that needs a second moment where there is none."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, EXACT):
        raise ValueError(
            f"{name!r}: {method.name} takes its curvature from Adam's second moment, which {kind} does not keep. "
            "Use Adam, AdamW or RAdam; or let the method keep its own average of squared gradients, `fisher(method)`; or give `curvature=`."
        )
    group: Any = next(group for group in optimizer.param_groups if any(held is parameter for held in group["params"]))
    if method.push is not None and not exact(optimizer, group):
        raise ValueError(
            f"{name!r}: {method.name} feeds its penalty through the first moment, which {kind} with betas={tuple(group['betas'])} does not "
            "keep. Use beta1 > 0, or give `curvature=`."
        )


def _warn_mixed_decay(managed: Sequence[Managed]) -> None:
    """Say where the second moment is not the task gradient's alone: L2 decay that Adam adds to the gradient is squared into it."""
    mixed = [
        one
        for one in managed
        if reads_moments(one.method) and one.group.get("weight_decay", 0) and not one.group.get("decoupled_weight_decay", False)
    ]
    if mixed:
        warnings.warn(
            f"{type(mixed[0].optimizer).__name__} adds weight_decay={mixed[0].group['weight_decay']} to the gradient of {len(mixed)} "
            f"parameters such as {mixed[0].name!r}, so their curvature is not the task's alone. AdamW decays the weights instead.",
            stacklevel=4,
        )
