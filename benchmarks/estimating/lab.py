"""Lab: one byte-level language model, its data, and the training that every method shares. Running it does nothing.

Base: 1600 steps of AdamW at a constant rate of 3e-3, batches of 16 x 64 bytes, kept with its optimizer's state below out/. Every run goes
on from there for 250 steps while the rate falls linearly to zero, on batches that its seed alone decides. Quantized are the Linear layers
of the blocks; embeddings, positions and the head stay in float. The goals come from a trial that leaves the base's details open:
estimators_bases.py compares what rows are known of it with those of other bases, which `bases.py` lists.
"""

import copy
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from stepwell.methods.distill import Loss, plain
from stepwell.train.corpus import Corpus, byte_batches, load_corpus, sequences
from stepwell.train.transformer import byte_losses, byte_transformer

ROOT = Path(__file__).parents[2]
BATCH, LENGTH, BLOCK = 16, 64, 64
TERMS = BATCH * LENGTH  # loss terms averaged per step
PEAK, BASE_STEPS, BASE_SEED = 3e-3, 1600, 1000
STEPS, HELD_OUT, WIDE = 250, 512, 4096
SKIP = ("head",)
TEACHER_RATE = 2.2e-3  # the best of five for full precision, on validation data


class Student(NamedTuple):
    """A model about to be trained: it, its optimizer, the learning rate, and the seed of its data."""

    model: nn.Module
    optimizer: Optimizer
    rate: float
    seed: int


def adamw(model: nn.Module, rate: float) -> Optimizer:
    """Return the optimizer that everybody uses."""
    return AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def network(seed: int) -> nn.Module:
    """Return the network that everybody starts from."""
    return byte_transformer(length=LENGTH, seed=seed)


class Base(NamedTuple):
    """What a base is.

    Attributes:
        name: in words; its files lie in a folder of that name.
        build: makes the network from a seed.
        whole: whether the text includes the library's tests.
        optimizer: made for the network, at a rate.
        warmup: steps in which the first rate is reached.
        clip: largest norm of a gradient, here and in every run that goes on from it.
        seed: of the initial weights and the batches.
    """

    name: str = "ours"
    build: Callable[[int], nn.Module] = network
    whole: bool = True
    optimizer: Callable[[nn.Module, float], Optimizer] = adamw
    warmup: int = 0
    clip: float = math.inf
    seed: int = 0


OURS = Base()


class Lab:
    """The corpus and the base, made once and then read from out/.

    Attributes:
        block: of the grids.
        skip: layers that stay in float.
        steps: of a run.
        terms: loss terms averaged per step.
    """

    block: int | Literal["channel"] = BLOCK
    skip, steps, terms = SKIP, STEPS, TERMS

    def __init__(self, kind: Base = OURS, folder: Path = ROOT / "out" / "estimators") -> None:
        self.kind = kind
        self.folder = folder if kind.name == OURS.name else folder / kind.name
        self._teachers: dict[int, nn.Module] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The whole standard library, its tests included."""
        return load_corpus(whole=self.kind.whole)

    @cached_property
    def base(self) -> dict[str, dict[str, object]]:
        """State of the model and of its optimizer after training in full precision."""
        path = self.folder / f"base-{self.corpus.digest}.pt"
        if not path.exists():
            model = self.kind.build(self.kind.seed)
            optimizer = self.kind.optimizer(model, PEAK)
            for done, batch in enumerate(self.batches(BASE_STEPS, BASE_SEED + self.kind.seed)):
                for group in optimizer.param_groups:
                    group["lr"] = PEAK * min(1.0, (done + 1) / max(1, self.kind.warmup))
                step(model, optimizer, batch, plain, self.kind.clip)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        found: dict[str, dict[str, object]] = torch.load(path)
        return found

    def batches(self, steps: int, seed: int) -> list[Tensor]:
        """Return training batches `(16, 65)`."""
        return list(byte_batches(self.corpus.train, size=BATCH, length=LENGTH, steps=steps, seed=seed))

    def held_out(self, split: str) -> Tensor:
        """Return 512 sequences of "validation" or "test"; "wide" are 4096 of the test part."""
        if split == "wide":
            return sequences(self.corpus.test, length=LENGTH, count=WIDE)
        return sequences(getattr(self.corpus, split), length=LENGTH, count=HELD_OUT)

    def model(self) -> nn.Module:
        """Return the base."""
        model = self.kind.build(self.kind.seed)
        model.load_state_dict(self.base["model"])
        return model

    def student(self, rate: float, seed: int) -> Student:
        """Return the base with its optimizer's state, ready to be trained further."""
        model = self.model()
        optimizer = self.kind.optimizer(model, rate)
        optimizer.load_state_dict(copy.deepcopy(self.base["optimizer"]))
        for group in optimizer.param_groups:
            group["lr"] = rate
        return Student(model, optimizer, rate, seed)

    def train(self, student: Student, loss: Loss = plain, optimizer: Optimizer | None = None) -> None:
        """Take the 250 steps, by another optimizer where one wraps the student's; a group with a "peak" has a rate of its own."""
        taken = student.optimizer if optimizer is None else optimizer
        for done, batch in enumerate(self.batches(self.steps, student.seed)):
            for group in taken.param_groups:
                group["lr"] = group.get("peak", student.rate) * (1 - done / self.steps)
            step(student.model, taken, batch, loss, self.kind.clip)

    def teacher(self, seed: int) -> nn.Module:
        """Return the full-precision run of a seed: a teacher has seen what its student will see, and nothing else."""
        if seed not in self._teachers:
            path = self.folder / f"teacher-{self.corpus.digest}-{seed}.pt"
            student = self.student(TEACHER_RATE, seed)
            if path.exists():
                student.model.load_state_dict(torch.load(path))
            else:
                self.train(student)
                torch.save(student.model.state_dict(), path)
            self._teachers[seed] = student.model.eval()
        return self._teachers[seed]

    def loss(self, model: nn.Module, split: str) -> float:
        """Return nats per byte of a model as it is."""
        with torch.no_grad():
            return float(torch.cat([byte_losses(model, some) for some in self.held_out(split).split(HELD_OUT)]).mean())


def step(model: nn.Module, optimizer: Optimizer, batch: Tensor, loss: Loss, clip: float = math.inf) -> None:
    """Take one optimizer step, with gradients of at most a norm."""
    optimizer.zero_grad()
    inputs, targets = batch[:, :-1], batch[:, 1:]
    loss(model(inputs), targets, inputs).backward()
    if clip < math.inf:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
