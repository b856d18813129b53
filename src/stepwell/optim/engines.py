"""Engines: the kernels that can do a step in one pass, which of them this machine has, and how their work is spread over threads.

Threads are Python's: both kernels let go of the interpreter, and a pool of our own does not mix two OpenMP runtimes in one process.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepwell.optim import build

NAMES = ("c", "numba")  # best first
VARIABLE = "STEPWELL_KERNEL"  # environment: "c" or "numba" asks for that one alone, "none" for neither
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
    """A kernel: `step(arrays, start, stop, block, numbers)` steps the blocks from `start` to `stop`."""

    name: str
    step: Step


@cache
def best() -> Engine | None:
    """Return the fastest kernel of this machine; the first call may compile it for some seconds.

    Raises:
        ValueError: the environment variable asks for a kernel that does not exist, or that this machine cannot have.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "none", *NAMES):
        raise ValueError(f"`{VARIABLE}` must be one of {', '.join(NAMES)} and none: got {asked!r}.")
    if asked == "none":
        return None
    found = next((engine for name in ((asked,) if asked else NAMES) if (engine := load(name)) is not None), None)
    if asked and found is None:
        needs = "a C compiler (cc, gcc or clang)" if asked == "c" else 'numba: pip install "stepwell[fast]"'
        raise ValueError(f"`{VARIABLE}={asked}` needs {needs}. Leave the variable empty to take what there is.")
    return found


@cache
def load(name: str) -> Engine | None:
    """Return the kernel of this name, or None where the machine cannot have it."""
    step = _in_c() if name == "c" else _in_numba()
    return None if step is None else Engine(name, step)


def run(engine: Engine, arrays: Arrays, block: int, numbers: NDArray[np.void]) -> None:
    """Step all blocks of a parameter, with as many threads as torch uses."""
    elements = arrays.weight.numel()
    rows, threads = elements // block, min(torch.get_num_threads(), max(1, elements // WORTH))
    share = -(-rows // (threads * CUT)) * CUT
    if share >= rows:
        engine.step(arrays, 0, rows, block, numbers)
        return
    pool, starts = _pool(os.getpid(), threads), range(share, rows, share)
    waiting = [pool.submit(engine.step, arrays, start, min(start + share, rows), block, numbers) for start in starts]
    engine.step(arrays, 0, share, block, numbers)
    for future in waiting:
        future.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return helpers for one thread that works itself; a forked process, which inherits none, makes its own."""
    del process
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="stepwell")


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
