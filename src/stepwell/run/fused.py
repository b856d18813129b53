"""Fused passes: on a CPU the common case goes through one-pass kernels, where numba is installed; the eager passes serve the rest.

An eager pass calls torch some thirty times per piece of a weight; a kernel reads and writes each weight once, and allocates nothing. The
common case is float32 weights in contiguous memory on a symmetric integer grid with absmax scales in float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stepwell.blocks import Block, block_length
from stepwell.methods.lotion import Push, border, tolerance
from stepwell.run import fused_held, passes
from stepwell.run.managed import Managed, once
from stepwell.run.told import Told
from stepwell.threads import spread

PAYS = 1 << 20  # managed elements from which kernels are worth some seconds of compilation, once per machine: numba keeps them on disk
LONGEST = 1 << 14  # elements of a block whose forces stay in the cache between two loops
SHARE = 1 << 16  # elements that a thread of its own is worth

Kernel = Callable[..., None]


def pays(managed: Sequence[Managed]) -> bool:
    """Say whether the automatic path uses kernels: they serve enough elements, a compiler would not serve more, and numba is installed."""
    served = sum(one.weight.numel() for one in managed if serves(one) or fused_held.serves(one))
    rest = sum(one.weight.numel() for one in managed) - served
    return served >= PAYS and rest < passes.PAYS and kernels() is not None


def serves(one: Managed) -> bool:
    """Whether these kernels can do all that a parameter's method does in every step."""
    return _serves(one) and one.parameter.dtype == torch.float32 and one.parameter.is_cpu


@once
def _serves(one: Managed) -> bool:
    method = one.method
    return (
        (method.gradient, method.prox, method.init) == (None, None, None)
        and (method.push is None or isinstance(method.push, Push))
        and (method.deploy is None or method.deploys_nearest)
        and _common(one)
    )


@once
def _common(one: Managed) -> bool:
    """Whether a parameter's grid is that of the common case."""
    grid = one.grid
    return (grid.format.levels, grid.rule, grid.scale_dtype, grid.compute) == ("symmetric", "absmax", "fp32", None)


@cache
def kernels() -> ModuleType | None:
    """Return the compiled kernels; None where numba is absent, or has no folder to keep them in."""
    try:
        from stepwell.run import kernels
    except (ImportError, RuntimeError):
        return None
    return kernels


def run(work: passes.Pass, managed: Managed, told: Told, tensors: list[Tensor], *numbers: float | Tensor) -> None:
    """Run a pass by its kernel where it has one for these tensors, else over cache-sized groups of rows."""
    ends = work in (passes.deploy, passes.arrive)
    here = told.fit is None and (_serves(managed) if work is passes.push else ends and managed.method.deploys_nearest and _common(managed))
    arrays = _arrays(managed, tensors) if here or fused_held.has(work, managed) else None
    if arrays is None:
        passes.piecewise(work, managed, told, tensors, *numbers)
        return
    format, compiled = managed.grid.format, kernels()
    assert compiled is not None
    if work is passes.arrive:
        fused_held.lengthen(managed, told, arrays, _split)
    if not here:
        written = tensors[: fused_held.run(work, managed, told, arrays, numbers, _split)]
    elif ends:
        _split(compiled.deploy, arrays, format.edge)
        written = tensors
    else:
        push = managed.method.push
        assert isinstance(push, Push)
        grid = (format.edge, border(torch.float32, format), tolerance(torch.float32, format))
        pull = float(told.loss_terms) * push.strength / 2
        _split(compiled.push, arrays, *(float(number) for number in numbers), pull, *grid, push.through_scale)
        written = tensors[1:2]
    torch.autograd.graph.increment_version(written)  # numpy writes behind autograd's back


def _arrays(managed: Managed, tensors: list[Tensor]) -> list[Any] | None:
    """Return `(blocks, block)` arrays on the tensors' own memory; None where a kernel cannot work on it."""
    cut = _cut(tensors[0].shape, managed.quantizer.block, managed.quantizer.axis)
    if cut is None:
        return None
    for tensor in tensors:  # all have the parameter's shape, so that one way to cut them serves all
        if type(tensor) is not Tensor or tensor.dtype != torch.float32 or not (tensor.is_cpu and tensor.is_contiguous()):
            return None
    return [tensor.numpy().reshape(cut) for tensor in tensors]


@lru_cache(maxsize=1024)
def _cut(shape: tuple[int, ...], block: Block, axis: int | None) -> tuple[int, int] | None:
    """Return `(blocks, block)` of a contiguous weight whose blocks lie one after the other and are short enough; None of others."""
    length = block_length(shape, block, axis)
    behind = () if axis is None or block is None else shape[axis % len(shape) + 1 :]
    return None if length > LONGEST or math.prod(behind) > 1 else (math.prod(shape) // length, length)


def _split(kernel: Kernel, arrays: list[Any], *numbers: Any) -> None:
    """Run a kernel on as many threads as torch uses; blocks do not know of each other, so that the cut leaves no trace."""
    rows, length = arrays[0].shape
    spread(lambda start, stop: kernel(*(array[start:stop] for array in arrays), *numbers), rows, most=rows * length // SHARE)
