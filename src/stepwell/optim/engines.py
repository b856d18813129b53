"""Engines: the kernels that can do a step in one pass, which of them this machine has, and how their work is spread over threads."""

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepwell.optim import build
from stepwell.threads import spread

NAMES = ("c", "numba")  # best first
ASKED = "triton"  # for GPUs, and only where it is asked for: it was checked in Triton's interpreter alone
VARIABLE = "STEPWELL_KERNEL"  # environment: one of these names asks for that one alone, "none" for none
CUT = 128  # rows; kernels give the same bits wherever rows are cut at multiples of it
WORTH = 1 << 17  # elements that are worth a thread: a tenth of a millisecond


class Arrays(NamedTuple):
    """What a kernel works on: contiguous float32 CPU tensors; `shown` and `scales` may be missing."""

    shown: Tensor | None
    weight: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    scales: Tensor | None


Step = Callable[[Arrays, int, int, int, NDArray[np.void]], None]


class Engine(NamedTuple):
    """A kernel: `step(arrays, start, stop, block, numbers)` steps the blocks from `start` to `stop`.

    Attributes:
        name: of it.
        step: the function.
        devices: types of the devices whose tensors it steps.
        longest: the longest block that it takes; None is any.
    """

    name: str
    step: Step
    devices: tuple[str, ...] = ("cpu",)
    longest: int | None = None


@cache
def best() -> Engine | None:
    """Return the fastest kernel of this machine; the first call may compile it for some seconds.

    Raises:
        ValueError: the environment variable asks for a kernel that does not exist, or that this machine cannot have.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "none", *NAMES, ASKED):
        raise ValueError(f"`{VARIABLE}` must be one of {', '.join((*NAMES, ASKED))} and none: got {asked!r}.")
    if asked == "none":
        return None
    found = next((engine for name in ((asked,) if asked else NAMES) if (engine := load(name)) is not None), None)
    if asked and found is None:
        needs = {"c": "a C compiler (cc, gcc or clang)", "numba": 'numba: pip install "stepwell[fast]"', ASKED: "a GPU, and triton"}[asked]
        raise ValueError(f"`{VARIABLE}={asked}` needs {needs}. Leave the variable empty to take what there is.")
    return found


@cache
def load(name: str) -> Engine | None:
    """Return the kernel of this name, or None where the machine cannot have it."""
    if name == ASKED:
        return _in_triton()
    step = _in_c() if name == "c" else _in_numba()
    return None if step is None else Engine(name, step)


def run(engine: Engine, arrays: Arrays, block: int, numbers: NDArray[np.void]) -> None:
    """Step all blocks of a parameter, with as many threads as torch uses."""
    elements = arrays.weight.numel()
    if engine.name == ASKED:
        engine.step(arrays, 0, elements // block, block, numbers)
        return
    spread(lambda start, stop: engine.step(arrays, start, stop, block, numbers), elements // block, most=elements // WORTH, cut=CUT)


def _in_c() -> Step | None:
    library = build.library()
    if library is None:
        return None
    kernel = library.stepwell_adamw

    def step(arrays: Arrays, start: int, stop: int, block: int, numbers: NDArray[np.void]) -> None:
        shown, weight, grad, first, second, scales = arrays
        kernel(
            None if shown is None else shown.data_ptr(),
            weight.data_ptr(),
            grad.data_ptr(),
            first.data_ptr(),
            second.data_ptr(),
            None if scales is None else scales.data_ptr(),
            start,
            stop,
            block,
            numbers.ctypes.data,
        )

    return step


def _in_numba() -> Step | None:
    try:
        from stepwell.optim import kernel_numba
    except ImportError:
        return None
    nothing = np.empty(0, np.float32)

    def step(arrays: Arrays, start: int, stop: int, block: int, numbers: NDArray[np.void]) -> None:
        flat = (nothing if array is None else array.detach().numpy().reshape(-1) for array in arrays)
        kernel_numba.step(*flat, start, stop, block, numbers)

    return step


def _in_triton() -> Engine | None:
    """Return the kernel for GPUs, where there is one, or for the CPU inside Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or torch.cuda.is_available()):
        return None
    try:
        from stepwell.optim import kernel_triton
    except ImportError:
        return None

    def step(arrays: Arrays, start: int, stop: int, block: int, numbers: NDArray[np.void]) -> None:
        assert start == 0
        with torch.cuda.device_of(arrays.weight):  # type: ignore[no-untyped-call]
            kernel_triton.step(arrays, stop, block, numbers)

    return Engine(ASKED, step, ("cuda", "cpu") if interpreted else ("cuda",), kernel_triton.LONGEST)
