"""Calibration: which inputs a layer sees, as the second moment that measures errors of its weight.

For a layer y = W x the squared error of the output is `sum over rows r of (q_r - w_r)^T H (q_r - w_r)`, H the mean of x x^T. A convolution
is the same with x the patches under its kernel, group by group.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

Forward = Callable[[nn.Module, Any], Any]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
PATCHES = 1 << 24  # numbers that are unfolded at once


class Use(NamedTuple):
    """How the forward pass uses a parameter.

    Attributes:
        modules: that hold it.
        calls: the most that one forward pass makes to them.
        twin: the parameter used right before it on the very same input, as the projections of an attention are; None where there is none.
    """

    modules: list[nn.Module]
    calls: int
    twin: str | None


class _Enough(BaseException):
    """Ends a forward pass whose rest is of no interest; no `except Exception` of a model stops it."""


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping by keywords, a tuple or list by position, anything else as the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def holders(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Module]]:
    """Return the modules that hold each parameter as their weight.

    Raises:
        ValueError: a parameter of a module whose input is not the input of its product (attention projections, experts), or is not known.
    """
    found: dict[int, list[nn.Module]] = {}
    unknown = set()
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append(module)
            if local != "weight" or not _is_product(module):
                unknown.add(id(parameter))
    for name, parameter in parameters.items():
        if id(parameter) in unknown:
            raise ValueError(
                f"{name!r} cannot be calibrated: only weights of Linear, Conv1d, Conv2d and GPT-2's Conv1D layers are known to be "
                f"multiplied with their module's input. Leave it out with `skip=[{name!r}]` and round it with `rtn`."
            )
    return {name: found[id(parameter)] for name, parameter in parameters.items()}


def uses(model: nn.Module, modules: Mapping[str, list[nn.Module]], batches: Sequence[Any], forward: Forward) -> dict[str, Use]:
    """Return how each parameter is used, in the order of first calls.

    Raises:
        ValueError: parameters that no batch reaches.
    """
    calls: dict[str, int] = {}
    most: dict[str, int] = {}
    twins: dict[str, str | None] = {}
    last: tuple[str, Tensor, int] | None = None  # holds the input itself, so that no other tensor takes its place in memory

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal last
            calls[name] = calls.get(name, 0) + 1
            x = _input(inputs, options)
            version = -1 if x.is_inference() else x._version  # inference tensors may be written without a trace
            twin = last[0] if last and last[1] is x and last[2] == version >= 0 and not isinstance(module, CONVOLUTIONS) else None
            twins[name] = twin if twins.get(name, twin) == twin else None
            last = (name, x, version)

        return hook

    handles = [module.register_forward_pre_hook(count(name), with_kwargs=True) for name, each in modules.items() for module in each]
    try:
        for batch in batches:
            calls.clear()
            last = None
            forward(model, batch)
            for name, number in calls.items():
                most[name] = max(most.get(name, 0), number)
    finally:
        _remove(handles)
    missing = [name for name in modules if name not in most]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (" and others" if len(missing) > 5 else "")
        raise ValueError(
            f"`batches` never reach {shown}: got {len(batches)} batches, "
            f"which call {len(most)} of {len(modules)} layers. Calibrate with data that uses them, or leave them out with `skip=[...]`, as "
            "must be done where the model multiplies with `layer.weight` itself and never calls the layer."
        )
    once = {name for name, number in most.items() if number == 1}
    return {name: Use(modules[name], number, twins[name] if {name, twins[name]} <= once else None) for name, number in most.items()}


def second_moment(model: nn.Module, use: Use, batches: Iterable[Any], forward: Forward) -> Tensor:
    """Return the mean of x x^T over all inputs of a layer, `(groups, columns, columns)`, float32, or float64 for float64 weights."""
    total, rows = None, 0

    def tap(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal total, rows
        for part in columns(module, _input(inputs, options).detach()):
            if total is None:
                total = part.new_zeros(len(part), part.shape[1], part.shape[1])
            total.baddbmm_(part, part.mT)
            rows += part.shape[2]
        if use.calls == 1:
            raise _Enough

    handles = [module.register_forward_pre_hook(tap, with_kwargs=True) for module in use.modules]
    try:
        for batch in batches:
            with suppress(_Enough):
                forward(model, batch)
    finally:
        _remove(handles)
    assert total is not None
    return total / max(rows, 1)


def columns(module: nn.Module, x: Tensor) -> Iterable[Tensor]:
    """Yield a layer's inputs as what its weight's rows are multiplied with, `(groups, columns, inputs)`, in parts of bounded size."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    x = x.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not isinstance(module, CONVOLUTIONS):
        yield x.reshape(-1, x.shape[-1]).T[None]
        return
    # a convolution along one dimension is one of height 1
    flat = isinstance(module, nn.Conv1d)
    sides = [(1, *side) if flat else tuple(side) for side in (module.kernel_size, module.dilation, module.stride)]
    x = x if x.ndim == weight.ndim else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    x = x[:, :, None] if flat else x
    step = max(1, PATCHES // (x[0].numel() * sides[0][0] * sides[0][1]))
    for part in torch.split(x, step):
        patches = functional.unfold(part, sides[0], dilation=sides[1], stride=sides[2])
        yield patches.reshape(len(part), module.groups, weight[0].numel(), -1).movedim(0, 2).flatten(2)


def _is_product(module: nn.Module) -> bool:
    """Say whether a module multiplies its weight with its input; attention calls its output projection's weight, not the module."""
    kind = type(module).__name__
    linear = isinstance(module, nn.Linear) and kind != "NonDynamicallyQuantizableLinear"
    return linear or isinstance(module, CONVOLUTIONS) or kind == "Conv1D"


def _input(inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Return the input of a layer that is called by position or by keyword."""
    x = inputs[0] if inputs else options["x" if "x" in options else "input"]
    assert isinstance(x, Tensor)
    return x


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
