"""Activation quantization: what goes into the selected layers is rounded to 8 bits, in training and in the exported file alike.

Dynamic, one scale per token, or static, one scale and zero point per tensor from the range seen on calibration data; the arithmetic is in
`activation_grids`. A token is a vector along the last dimension, and for a convolution everything but the first dimension. Rounding lives
in forward pre-hooks: the model's code, parameters and state-dict keys stay, and torch.compile traces it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.activation_grids import Range, operators, per_tensor, per_token
from stepwell.modes import evaluating
from stepwell.ptq.calibration import run_batch
from stepwell.selection import CONVOLUTIONS, PROJECTIONS, Selection, select

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Activations:
    """Rounded activations of a model, until they are removed.

    Attributes:
        static: module name -> its range; empty where every token has its own scale. Give it to `quantize_activations` to resume.
        modules: names of the modules whose inputs are rounded.
    """

    def __init__(self, hooks: Mapping[str, "_Rounding"], handles: Sequence[Any]) -> None:
        self.static = {name: hook.range for name, hook in hooks.items() if hook.range is not None}
        self.modules = tuple(hooks)
        self._handles = list(handles)

    def remove(self) -> None:
        """Take the rounding out of the model again; doing so twice changes nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __repr__(self) -> str:
        scheme = "static int8 per tensor" if self.static else "dynamic int8 per token"
        return f"{scheme} activations into {len(self.modules)} modules{'' if self._handles else ', removed'}"


def quantize_activations(
    model: nn.Module, *, calibrate: Iterable[Any] | None = None, static: Mapping[str, Range] | None = None, skip: Sequence[str] = ()
) -> Activations:
    """Round the inputs of every layer whose weight `select` takes to 8 bits, with a straight-through gradient.

    Neither argument: dynamic, one scale per token. Weights are not touched: attach a method or round them as well, for W8A8 or W4A8. Call
    it before `torch.compile`. `export.onnx` and `export.onnx_qdq` write static ranges as QuantizeLinear and DequantizeLinear, and dynamic
    ones as the arithmetic they are.

    Args:
        model: any module.
        calibrate: batches on which the range of every input is measured, for static rounding; the model sees them in evaluation mode. A
            batch is given by keywords if it is a mapping, by position if it is a tuple or list, else as the only argument.
        static: ranges by module name from an earlier call's `.static`, instead of measuring them.
        skip: names or patterns of parameters or modules to leave alone.

    Returns:
        A handle: `.remove()` undoes it.

    Raises:
        ValueError: both `calibrate` and `static`, no batch, a layer that no batch reaches, ranges that do not name the layers, activations
            that are rounded already, or a selected weight that its module does not multiply with its own input (the output projection of
            `nn.MultiheadAttention`, experts).
    """
    if calibrate is not None and static is not None:
        raise ValueError("`calibrate` and `static` are two ways to the same ranges: got both. Leave one out.")
    modules = _modules(model, skip)
    known: Mapping[str, Range] = {}
    if calibrate is not None:
        known = _measured(model, modules, calibrate)
    elif static is not None:
        if set(static) != set(modules):
            odd = sorted(set(static) ^ set(modules))
            raise ValueError(f"`static` must have a range for each of the {len(modules)} selected modules: {odd[0]!r} is on one side only.")
        known = static
    hooks = {name: _Rounding(known.get(name)) for name in modules}
    return Activations(hooks, [modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name, hook in hooks.items()])


@contextmanager
def as_operators(model: nn.Module) -> Iterator[bool]:
    """Let static rounding be traced as ONNX operators while the block runs; yield whether there is any."""
    hooks = [hook for hook in _hooks(model) if hook.range is not None]
    for hook in hooks:
        hook.operators = True
    try:
        yield bool(hooks)
    finally:
        for hook in hooks:
            hook.operators = False


def ranges(model: nn.Module) -> dict[str, Range]:
    """Return the static ranges in a model by module name, every name of it."""
    named = dict(model.named_modules(remove_duplicate=False))
    found = {name: [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Rounding)] for name, module in named.items()}
    return {name: hook.range for name, hooks in found.items() for hook in hooks if hook.range is not None}


def refuse_rounded(model: nn.Module, target: str) -> None:
    """Refuse a model whose activations are rounded, for a target whose files cannot say so.

    Raises:
        ValueError: it has hooks that round.
    """
    if hooks := _hooks(model):
        raise ValueError(
            f"`model` rounds the activations into {len(hooks)} modules, which {target} does not hold. Export to ONNX, or call `.remove()` "
            "on the handle of `quantize_activations` first."
        )


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """Let activations be what they are while the block runs."""
    hooks = _hooks(model)
    for hook in hooks:
        hook.active = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.active = True


class _Rounding:
    """A forward pre-hook that rounds the inputs of a layer."""

    def __init__(self, range: Range | None) -> None:
        self.range = range
        self.active = True
        self.operators = False  # whether a trace shall hold ONNX's operators in place of their arithmetic

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the layer's arguments with rounded activations."""
        if not self.active:
            return None
        rounded: dict[int, Tensor] = {}  # attention looks whether its inputs are one tensor
        names = _names(module)

        def round(x: Tensor) -> Tensor:
            if id(x) not in rounded:
                rounded[id(x)] = self._rounded(module, x)
            return rounded[id(x)]

        positions = tuple(round(x) if place < len(names) else x for place, x in enumerate(inputs))
        return positions, {name: round(x) if name in names else x for name, x in options.items()}

    def _rounded(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.range is None:
            return per_token(x, tuple(range(1, x.ndim)) if isinstance(module, CONVOLUTIONS) else (-1,))
        return operators(x, self.range) if self.operators else per_tensor(x, self.range)


def _hooks(model: nn.Module) -> list[_Rounding]:
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values() if isinstance(hook, _Rounding)]


def _names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module that its weights are multiplied with."""
    if isinstance(module, nn.MultiheadAttention):
        return ("query", "key", "value")
    return ("x",) if type(module).__name__ == "Conv1D" else ("input",)


def _modules(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules whose inputs meet a selected weight, by name; one that is known under several names once."""
    if _hooks(model):
        raise ValueError(
            f"`model` must not round its activations already: got {len(_hooks(model))} hooks. Call `.remove()` on the handle first."
        )
    owners = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    selection: Selection[bool] = select(model, skip=skip)
    for row in selection.chosen:
        path, _, local = row.name.rpartition(".")
        module, parent = owners[path], owners[path.rpartition(".")[0]] if path else None
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"`model`: {row.name!r} belongs to nn.MultiheadAttention, which multiplies it without calling its module, so that its "
                f"inputs cannot be rounded: got {type(module).__name__}. Leave it out with `skip=[{path!r}]`."
            )
        if local != "weight" and local not in PROJECTIONS:
            raise ValueError(
                f"`model`: {row.name!r} is not multiplied with the input of its module: got {type(module).__name__}. "
                f"Leave it out with `skip=[{row.name!r}]`."
            )
        if not any(module is other for other in found.values()):
            found[path] = module
    if not found:
        raise ValueError(f"`model` must hold a layer that `select` takes: got {type(model).__name__} with skip={list(skip)}.")
    return found


def _measured(model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Range]:
    """Return the ranges of the inputs of modules over batches."""
    ends: dict[str, tuple[float, float]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            names = _names(module)
            for x in [*inputs[: len(names)], *(value for key, value in options.items() if key in names)]:
                low, high = (float(end) for end in x.detach().float().aminmax())
                before = ends.get(name, (low, high))
                ends[name] = min(low, before[0]), max(high, before[1])

        return hook

    handles = [module.register_forward_pre_hook(look(name), with_kwargs=True) for name, module in modules.items()]
    number = 0
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                run_batch(model, batch)
                number += 1
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in ends]
    if missing:
        raise ValueError(f"`calibrate` must reach every selected layer: {missing[0]!r} was not called by {number} batches.")
    odd = [name for name, pair in ends.items() if not all(abs(end) < float("inf") for end in pair)]
    if odd:
        raise ValueError(f"`calibrate` must give finite activations: got {ends[odd[0]]} into {odd[0]!r}.")
    return {name: Range.of(*ends[name]) for name in modules}
