"""Pictures: the lab's place for small networks that sort images, CIFAR-10 and digits. Running it does nothing.

Base: AdamW at a constant rate of 3e-3, kept with its optimizer's state below out/. Every run goes on from there while the rate falls
linearly to zero, on batches that its seed alone decides: CIFAR-10 for two epochs of its 10,000 images, the digits for 400 steps. One scale
per output channel; all weights of convolutions and Linear layers are quantized, the first and the last included. Where a network has
BatchNorm, its statistics are taken anew for the finished weights, from the same 1,000 training images for everybody.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from estimating.lab import ROOT, Student, adamw
from stepwell.methods.distill import Loss, plain
from stepwell.train.data import Images, batches, load_digits
from stepwell.train.images import image_batches, load_cifar
from stepwell.train.loop import Score, evaluate
from stepwell.train.models import cifar_cnn, mlp

PEAK, BASE_SEED, RATE = 3e-3, 1000, 2.2e-3  # RATE is of the full-precision run that rounding rounds
SETTLING = 1000  # images


class Task(NamedTuple):
    """Images, the network before training, and how long it is trained.

    Attributes:
        parts: train, validation and test images.
        drawn: `drawn(steps, seed)` yields training batches.
        build: makes the network.
        size: images per batch.
        base_steps, steps: of the base, and of every run.
    """

    parts: dict[str, Images]
    drawn: Callable[[int, int], Iterator[Images]]
    build: Callable[[], nn.Module]
    size: int
    base_steps: int
    steps: int


def cifar() -> Task:
    """Return CIFAR-10: three convolutions with BatchNorm, 26,032 weights; ten epochs, then two."""
    data, size = load_cifar(), 64
    epoch = len(data.train.labels) // size
    return Task(
        {"train": data.train, "validation": data.validation, "test": data.test},
        lambda steps, seed: image_batches(data.train, size, steps=steps, seed=seed),
        lambda: cifar_cnn((16, 32, 64), seed=0),
        size,
        10 * epoch,
        2 * epoch,
    )


def digits() -> Task:
    """Return the digits: the demo's network of three Linear layers."""
    data, size = load_digits(), 64
    return Task(
        {"train": data.train, "validation": data.validation, "test": data.test},
        lambda steps, seed: batches(data, size, steps=steps, seed=seed),
        lambda: mlp((64, 96, 96, 10), seed=0),
        size,
        2000,
        400,
    )


TASKS: dict[str, Callable[[], Task]] = {"cifar10": cifar, "digits": digits}


class PictureLab:
    """What `Lab` is to the language model; the arms know no difference."""

    block = "channel"
    skip: tuple[str, ...] = ()

    def __init__(self, name: str, folder: Path = ROOT / "out" / "estimators") -> None:
        self.name, self.folder, self.task = name, folder, TASKS[name]()
        self.steps, self.terms = self.task.steps, self.task.size
        self._teachers: dict[int, nn.Module] = {}

    @cached_property
    def base(self) -> dict[str, dict[str, object]]:
        """State of the network and of its optimizer after training in full precision."""
        path = self.folder / f"base-{self.name}.pt"
        if not path.exists():
            model = self.task.build()
            optimizer = adamw(model, PEAK)
            for batch in self.task.drawn(self.task.base_steps, BASE_SEED):
                step(model, optimizer, batch, plain)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        found: dict[str, dict[str, object]] = torch.load(path)
        return found

    def student(self, rate: float, seed: int) -> Student:
        """Return the base with its optimizer's state, ready to be trained further."""
        model = self.task.build()
        model.load_state_dict(self.base["model"])
        optimizer = adamw(model, rate)
        optimizer.load_state_dict(copy.deepcopy(self.base["optimizer"]))
        for group in optimizer.param_groups:
            group["lr"] = rate
        return Student(model, optimizer, rate, seed)

    def train(self, student: Student, loss: Loss = plain, optimizer: Optimizer | None = None) -> None:
        """Take the run's steps, by another optimizer where one wraps the student's."""
        taken = student.optimizer if optimizer is None else optimizer
        for done, batch in enumerate(self.task.drawn(self.steps, student.seed)):
            for group in taken.param_groups:
                group["lr"] = group.get("peak", student.rate) * (1 - done / self.steps)
            step(student.model, taken, batch, loss)

    def teacher(self, seed: int) -> nn.Module:
        """Return the full-precision run of a seed: what rounding without training begins with."""
        if seed not in self._teachers:
            student = self.student(RATE, seed)
            self.train(student)
            self._teachers[seed] = student.model.eval()
        return self._teachers[seed]

    def score(self, model: nn.Module, split: str) -> Score:
        """Return loss and accuracy of finished weights, with BatchNorm's statistics taken anew."""
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        for layer in norms:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
        if norms:
            model.train()
            with torch.no_grad():
                for pixels in self.task.parts["train"].pixels[:SETTLING].split(self.task.size):
                    model(pixels)
        return evaluate(model, self.task.parts[split])


def step(model: nn.Module, optimizer: Optimizer, batch: Images, loss: Loss) -> None:
    """Take one optimizer step."""
    model.train()
    optimizer.zero_grad()
    loss(model(batch.pixels), batch.labels, batch.pixels).backward()
    optimizer.step()
