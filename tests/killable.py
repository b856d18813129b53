"""Training in processes that are killed: forked from one server that has imported everything, so that a start costs milliseconds."""

import multiprocessing
import time
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 - imported lazily otherwise, in every process anew
from tests.language import tiny

from stepwell.train.outcome import finish
from stepwell.train.pretrain import pretrain

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.killable"])
KILLED = -9


def train(out, data, resume):
    """Train the tiny recipe to its end, saving at every other step."""
    import torch

    torch.set_num_threads(1)
    finish(pretrain(tiny(steps=12, save_every=2), Path(out), data=data, resume=resume), Path(out))


def run(out, data, *, resume=False, kill_after=None):
    """Train in a process of its own, killed so many seconds after its first sign of life; return exit code and seconds."""
    process = SERVER.Process(target=train, args=(str(out), str(data), resume))
    process.start()
    began = time.monotonic()
    while kill_after is not None and process.is_alive() and not (out / "run.json").exists():
        time.sleep(0.001)  # importing and building took that long
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join()
    return process.exitcode, time.monotonic() - began
