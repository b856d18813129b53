"""Fused passes of the methods beside STE and LOTION, of signed and half-odd grids, and of every method at scales that the Run holds.

`fused` serves the common case. Scales that are not held are fitted by the eager rule first, which takes two sweeps more.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from stepwell.methods.base import Method, round_nearest
from stepwell.methods.binary_relax import relaxed
from stepwell.methods.cage import pulled
from stepwell.methods.coupled import Coupled
from stepwell.methods.fisher import FISHER, SEEN, Observed, Reading
from stepwell.methods.learned import FIRST, PEAK, SCALE, SECOND, STEPS, Learned, Scales
from stepwell.methods.lotion import Push, border, tolerance
from stepwell.methods.parq import annealed
from stepwell.methods.prox import EPSILON, step
from stepwell.methods.sampled import drawn
from stepwell.methods.soft import smoothed
from stepwell.methods.ste import Clipped
from stepwell.run import fused_soft, passes
from stepwell.run.managed import Managed, once
from stepwell.run.told import MOVED, Told

Split = Callable[..., None]


class Call(NamedTuple):
    """A pass to be made by a kernel.

    Attributes:
        compiled: the kernels.
        one: the parameter.
        told: what the method may know.
        arrays: `(blocks, block)`, those of the pass.
        scale: `(blocks,)`.
        numbers: of the pass.
        split: runs a kernel on as many threads as there are, given the arrays that are cut by rows and the rest.
    """

    compiled: ModuleType
    one: Managed
    told: Told
    arrays: list[Any]
    scale: Any
    numbers: Sequence[float | Tensor]
    split: Split

    @property
    def grid(self) -> list[float]:
        """Lowest and highest value, and what makes the values integers."""
        format = self.one.grid.format
        return [format.low, format.high, format.shift]


def serves(one: Managed) -> bool:
    """Whether kernels can do all that a parameter's method does in every step."""
    return _knows(one) and one.parameter.dtype == torch.float32 and one.parameter.is_cpu


@once
def _knows(one: Managed) -> bool:
    """Whether there are kernels for a parameter's method on its grid."""
    method, grid = one.method, one.grid
    return (
        _changes(method)
        and (method.deploy is None or method.deploy in (round_nearest, annealed, relaxed, drawn, smoothed))
        and (method.prox is None or _read(method.prox) in (pulled, step))
        and (method.push is None or _pushes(one))
        and any(part is not None for part in (method.deploy, method.prox, method.push, method.gradient))
        and grid.format.levels in ("symmetric", "full", "mid")
        and (isinstance(grid.rule, str) or isinstance(method.init, Scales))  # else the scale is a fixed number
        and (grid.scale_dtype, grid.compute) == ("fp32", None)
    )


def has(work: passes.Pass, one: Managed) -> bool:
    """Whether a pass of this parameter has a kernel here."""
    if work is passes.show and one.method.deploy is not smoothed:
        return False  # the eager pass gives the same bits
    return (work in KERNELS or work is passes.lengthen) and serves(one) and kernels() is not None


@cache
def kernels() -> ModuleType | None:
    """Return the compiled kernels; None where numba is absent, or has no folder to keep them in."""
    try:
        from stepwell.run import kernels_held
    except (ImportError, RuntimeError):
        return None
    return kernels_held


def run(work: passes.Pass, one: Managed, told: Told, arrays: list[Any], numbers: Sequence[float | Tensor], split: Split) -> int:
    """Run a pass over `(blocks, block)` arrays by its kernel; return how many of the arrays, from the first, were written."""
    compiled = kernels()
    assert compiled is not None
    if work is passes.lengthen:
        lengthen(one, told, arrays, split)
        return 1
    if told.fit is None:
        scale = _fitted(one, arrays[1 if work in (passes.gradient, passes.descend, passes.show) else 0], split)
    else:
        scale = told.fit.scale.to(torch.float32).numpy().reshape(-1)
    return KERNELS[work](Call(compiled, one, told, arrays, scale, numbers, split))


def lengthen(one: Managed, told: Told, arrays: list[Any], split: Split) -> None:
    """Make the optimizer's step longer, in the parameter's `(blocks, block)` array beside the latent weight's."""
    compiled = kernels()
    assert compiled is not None
    carried = _rows(told.tensors[MOVED]) if MOVED in told.tensors else np.ones(len(arrays[0]), np.float32)
    split(compiled.lengthen, [*arrays, carried], one.method.rate_multiplier)


def _fitted(one: Managed, weight: Any, split: Split) -> Any:
    """Return the scales of `(blocks, block)` weights by the grid's own rule, `(blocks,)`."""
    from stepwell.run import kernels as compiled

    grid = one.grid
    if grid.rule != "absmax" or grid.scale_rounding == "floor":
        return grid.fit(torch.from_numpy(weight)).scale.view(-1).numpy()
    scale = np.empty(len(weight), np.float32)
    split(compiled.absmax, [weight, scale], grid.format.edge, grid.format.levels == "full")
    return scale


def _deploy(call: Call) -> int:
    """Write what the forward pass sees."""
    deploy, values = call.one.method.deploy, {name: float(value) for name, value in call.told.scheduled.items()}
    arrays = [*call.arrays, call.scale]
    if deploy is drawn:
        places = call.told.offset + np.arange(len(call.scale), dtype=np.int64) * arrays[0].shape[1]
        call.split(call.compiled.drawn, [*arrays, places], *call.grid, np.int64(int(call.told.key)))
    elif deploy is annealed:
        slope = values["slope"]
        numbers = [*call.grid, max((1 - slope) / 2, 0.0), max(slope, float(call.compiled.TINY))]
        call.split(call.compiled.affine, arrays, *numbers)
    elif deploy is relaxed:
        call.split(call.compiled.relaxed, arrays, *call.grid, max(1 - values["share"], 0.0))
    elif deploy is smoothed and values["temperature"] > 0:
        np.copyto(arrays[1], arrays[0])
        _smooth(call, arrays[0], arrays[0])
    else:
        call.split(call.compiled.nearest, arrays, *call.grid)
    return 2


def _show(call: Call) -> int:
    """Write what the forward pass sees of a latent weight on the soft staircase, whose error function is not torch's to the last bit."""
    into, latent = call.arrays
    if float(call.told.scheduled["temperature"]) > 0:
        _smooth(call, into, latent)
    else:
        np.copyto(into, latent)
        call.split(call.compiled.nearest, [into, np.empty_like(latent), call.scale], *call.grid)
    return 1


def _smooth(call: Call, into: Any, weight: Any) -> None:
    compiled = fused_soft.kernels()
    assert compiled is not None
    found = fused_soft.smoothing(call.one.grid.format, float(call.told.scheduled["temperature"]))
    call.split(compiled.smoothed, [into, weight, call.scale], found.table, *call.grid, fused_soft.NODES, found.inner, found.outer)


def _prox(call: Call) -> int:
    """Take the method's step after the optimizer's."""
    told, prox = call.told, call.one.method.prox
    rate, values = float(told.lr), {name: float(value) for name, value in told.scheduled.items()}
    if prox is pulled:
        call.split(call.compiled.pulled, [call.arrays[0], call.scale], *call.grid, min(rate * values["pull"], 1.0))
        return 1
    correction = 0.0 if told.correction is None else float(told.correction)
    numbers = [*call.grid, values["strength"] * float(told.loss_terms) * rate, correction, EPSILON]
    call.split(call.compiled.proximal, [call.arrays[0], _curvature(call, prox, 1), call.scale], *numbers)
    return 1


def _push(call: Call) -> int:
    """Add LOTION's penalty to the first moment."""
    weight, moment, _, second = call.arrays
    arrays = [weight, moment, _curvature(call, call.one.method.push, 2), second, call.scale]
    numbers, through_scale = _penalty(call)
    common = [*call.grid, *(float(number) for number in call.numbers)]
    if through_scale:
        call.split(call.compiled.push, arrays, *common, *numbers)
    else:
        call.split(call.compiled.push_apart, arrays, *common, *numbers[:2])
    return 2


def _descend(call: Call) -> int:
    """Write a step down LOTION's penalty."""
    arrays = [*call.arrays[:2], _curvature(call, call.one.method.push, 2), call.scale]
    numbers, through_scale = _penalty(call)
    call.split(call.compiled.descend, arrays, *call.grid, float(call.told.lr), *numbers, through_scale)
    return 1


def _gradient(call: Call) -> int:
    """Change the gradient, and what a method learns from it; hand over the latent weight where there is one."""
    change, told, (gradient, weight, parameter) = call.one.method.gradient, call.told, call.arrays
    low, high, _ = call.grid
    if isinstance(change, Learned):
        _learn(call, change)
        return 3
    if isinstance(change, Clipped):
        call.split(call.compiled.clip, [gradient, weight, parameter, call.scale], low * change.clip, high * change.clip)
        return 3
    if isinstance(change, Observed):
        call.split(call.compiled.observe, [gradient, _own(call, FISHER), _rows(told.tensors[SEEN])], 1 - change.decay)
    else:
        assert isinstance(change, Coupled)
        pull = float(told.loss_terms) * float(told.scheduled["strength"]) / 2
        arrays = [gradient, weight, _own(call, FISHER), call.scale, _rows(told.tensors[SEEN])]
        near = tolerance(torch.float32, call.one.grid.format)
        call.split(call.compiled.couple, arrays, *call.grid, pull, near, 1 - change.decay)
    if call.one.method.deploy is not None:
        np.copyto(parameter, weight)
    return 3


def _learn(call: Call, change: Learned) -> None:
    """Find the slopes of the scales, and move them."""
    from stepwell.run import kernels_learned as compiled

    told, (gradient, weight, parameter) = call.told, call.arrays
    own = _learning(call)
    numbers = (float(told.lr), change.rate, *change.betas, change.eps)
    if change.sees_grid:
        carried = _rows(told.tensors[MOVED]) if told.carries else np.empty_like(own[0])
        call.split(compiled.learn, [gradient, weight, parameter, carried, *own], *numbers, *call.grid[:2], told.carries)
    else:
        call.split(compiled.weigh, [gradient, weight, *own], *numbers, *call.grid)


def _learning(call: Call) -> list[Any]:
    """Return scales and what they learn with as arrays, made anew where the tensors lie elsewhere than a step before (loaded, moved)."""
    own = [call.told.tensors[name] for name in (SCALE, FIRST, SECOND, STEPS, PEAK)]
    places = [tensor.data_ptr() for tensor in own]
    before, arrays = _LEARNING.get(call.one, ([], []))
    if before != places:  # what lies at an address that an array holds on to is the same memory
        arrays = [_rows(tensor) for tensor in own]
        _LEARNING[call.one] = (places, arrays)
    return arrays


_LEARNING: WeakKeyDictionary[Managed, tuple[list[int], list[Any]]] = WeakKeyDictionary()

KERNELS: dict[passes.Pass, Callable[[Call], int]] = {
    passes.deploy: _deploy,
    passes.arrive: _deploy,  # once the step is longer
    passes.prox: _prox,
    passes.push: _push,
    passes.descend: _descend,
    passes.gradient: _gradient,
    passes.show: _show,
}


def _changes(method: Method) -> bool:
    """Whether a kernel knows what a method does to gradients."""
    change = method.gradient
    return change is None or isinstance(change, Clipped | Coupled) or (isinstance(change, Learned | Observed) and change.inner is None)


def _pushes(one: Managed) -> bool:
    """Whether a kernel knows a method's penalty."""
    return isinstance(_read(one.method.push), Push)


def _read(function: object) -> object:
    """Return what a function does, whatever it takes for curvature."""
    return function.function if isinstance(function, Reading) else function


def _curvature(call: Call, function: object, index: int) -> Any:
    """Return the curvature that a function reads: its own average, or the pass's array."""
    return _own(call, FISHER) if isinstance(function, Reading) else call.arrays[index]


def _own(call: Call, name: str) -> Any:
    """Return a method's own tensor as an array on its memory."""
    return call.told.tensors[name].numpy()


def _rows(tensor: Tensor) -> Any:
    """Return a `(blocks, 1)` tensor as an array of `(blocks,)` on its memory."""
    return tensor.numpy().reshape(-1)


def _penalty(call: Call) -> tuple[list[float], bool]:
    """Return the penalty's factor and its tolerances, and whether it reaches the scale."""
    push, format = _read(call.one.method.push), call.one.grid.format
    assert isinstance(push, Push)
    factor = float(call.told.loss_terms) * push.strength / 2
    return [factor, tolerance(torch.float32, format), border(torch.float32, format)], push.through_scale and call.told.fit is None
