"""Trace: from a PyTorch model to an ONNX graph whose initializers still carry the parameters' names and layout."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.activations import as_operators

STATIC_OPSET = 21  # of the operators that static activations are written as


def check_example(example: tuple[Tensor, ...]) -> None:
    """Refuse what is not a tuple of tensors with at least one row each.

    Raises:
        TypeError: not a tuple of tensors.
        ValueError: no tensor, or an empty one.
    """
    if not isinstance(example, tuple) or not all(isinstance(part, Tensor) for part in example):
        raise TypeError(
            f"`example` must be a tuple of the model's input tensors: got {type(example).__name__}. Write `(x,)` for a single input."
        )
    if not example or any(part.numel() == 0 or part.ndim == 0 for part in example):
        shapes = [tuple(part.shape) for part in example]
        raise ValueError(f"`example` must hold input tensors with a batch dimension and elements: got shapes {shapes}.")


def check_sequence(example: tuple[Tensor, ...], sequence: int | None) -> None:
    """Refuse a sequence axis that the first input does not have, or that is the batch.

    Raises:
        TypeError: not an integer.
        ValueError: an axis outside 1..ndim - 1 of the first input.
    """
    if sequence is None:
        return
    if isinstance(sequence, bool) or not isinstance(sequence, int):
        raise TypeError(f"`sequence` must be an axis of the inputs or None: got {sequence!r}.")
    shape = tuple(example[0].shape)
    if not 0 < sequence < len(shape):
        allowed = f"an axis from 1 to {len(shape) - 1}" if len(shape) > 1 else "None, because there is only the batch axis"
        raise ValueError(
            f"`sequence` must be {allowed} for inputs of shape {shape}: got {sequence}. Axis 0 is the batch, which stays open."
        )


def sizes(inputs: tuple[Tensor, ...]) -> str:
    """Return the shapes of inputs in words.

    >>> sizes((torch.ones(2, 3), torch.ones(2)))
    '2x3 and 2'
    """
    return " and ".join("x".join(map(str, part.shape)) for part in inputs)


def reason(error: BaseException) -> str:
    """Return the beginning of what somebody else's exception says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def compute(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Run a model.

    Raises:
        ValueError: the model fails on these inputs; names their shapes and the model's reason.
    """
    try:
        with torch.no_grad():
            return model(*inputs)
    except Exception as error:  # a model raises whatever its parts raise
        raise ValueError(f"`example`: the model does not run on inputs of shape {sizes(inputs)}. It says: {reason(error)}") from error


def open_axes(example: tuple[Tensor, ...], sequence: int | None) -> list[dict[int, str]]:
    """Return, for every input, which of its axes stay open, by name.

    An input whose first axis is as long as that of the first input is batched; the same holds for the sequence axis.
    """
    wanted = {0: "batch"} if sequence is None else {0: "batch", sequence: "sequence"}
    first = example[0].shape
    return [{axis: name for axis, name in wanted.items() if axis < part.ndim and part.shape[axis] == first[axis]} for part in example]


def to_graph(model: nn.Module, example: tuple[Tensor, ...], *, axes: list[dict[int, str]], opset: int | None = None) -> Any:
    """Trace a model into torch's ONNX program, not yet optimized: every parameter is still an initializer of its own name and shape.

    Args:
        model: in evaluation mode, on the CPU. Static activations are traced as QuantizeLinear and DequantizeLinear.
        example: inputs; an open axis of length one is repeated first, because tracing would take a one for a constant.
        axes: open axes of every input, from `open_axes`.
        opset: version of the ONNX operators; None is the exporter's own.

    Raises:
        ValueError: the model does not run on the example.
        RuntimeError: the model cannot be traced, or fixes an axis that is to stay open.
    """
    # dynamic with a range to be found: a model with a longest sequence is fine, one with a fixed length is an error
    shapes = tuple(dict.fromkeys(part, torch.export.Dim.DYNAMIC) for part in axes)
    inputs = tuple(_at_least_two(part, list(opened)) for part, opened in zip(example, axes, strict=True))
    compute(model, example)  # tracing would take some inputs that the model does not, such as integers for numbers
    try:
        with quiet(), torch.no_grad(), _without_cache(model), as_operators(model) as static:
            traced = torch.export.export(model, inputs, dynamic_shapes=(shapes,) if _takes_any(model) else shapes, strict=False)
            version = max(opset or 0, STATIC_OPSET) if static else opset
            program = torch.onnx.export(traced, dynamo=True, optimize=False, verbose=False, opset_version=version)
            assert program is not None
            _name_axes(program, axes)
    except Exception as error:  # the exporter raises whatever its parts raise
        names = ", ".join(sorted({name for part in axes for name in part.values()}))
        raise RuntimeError(
            f"`model` could not be traced to ONNX with open axes {names}. Look for Python control flow on tensor values, or a fixed size "
            f"of an open axis, in its forward pass. torch.export says: {reason(error)}"
        ) from error
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logging: the exporter talks about its own insides, and what goes wrong comes as an exception."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(before, logging.ERROR))
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Switch off the cache of keys and values that transformers' models return unless told not to: a graph has no place for it."""
    configurations: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    switched = [part for part in {id(part): part for part in configurations}.values() if getattr(part, "use_cache", None) is True]
    for part in switched:
        part.use_cache = False
    try:
        yield
    finally:
        for part in switched:
            part.use_cache = True


def _takes_any(model: nn.Module) -> bool:
    """Whether the forward pass takes its inputs as `*args`, for which torch.export wants the shapes one level deeper."""
    from inspect import Parameter, signature

    kinds = [parameter.kind for parameter in signature(model.forward).parameters.values()]
    return bool(kinds) and kinds[0] is Parameter.VAR_POSITIONAL


def _at_least_two(part: Tensor, axes: list[int]) -> Tensor:
    """Repeat every axis of length one among `axes`."""
    for axis in axes:
        if part.shape[axis] == 1:
            part = torch.cat([part, part], dim=axis)
    return part


def _name_axes(program: Any, axes: list[dict[int, str]]) -> None:
    """Give the traced symbols the names of the open axes."""
    names = {}
    for value, opened in zip(program.model.graph.inputs, axes, strict=True):
        names.update({value.shape[axis]: name for axis, name in opened.items()})
    program.rename_axes(names)
