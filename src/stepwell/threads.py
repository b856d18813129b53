"""Rows spread over as many threads as torch uses.

Threads are Python's: compiled kernels let go of the interpreter, and a pool of our own does not mix two OpenMP runtimes in one process.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def spread(work: Callable[[int, int], object], rows: int, *, most: int, cut: int = 1) -> None:
    """Call `work(start, stop)` until all rows are done; rows must not know of each other.

    Args:
        work: a kernel that lets go of the interpreter.
        rows: how many there are.
        most: threads that they are worth.
        cut: rows are cut at multiples of it.
    """
    threads = max(1, min(torch.get_num_threads(), most))
    share = -(-rows // (threads * cut)) * cut
    if share >= rows:
        work(0, rows)
        return
    waiting = [_pool(os.getpid(), threads).submit(work, start, min(start + share, rows)) for start in range(share, rows, share)]
    work(0, share)
    for future in waiting:
        future.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return helpers for one thread that works itself; a forked process, which inherits none, makes its own."""
    del process
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="stepwell")
