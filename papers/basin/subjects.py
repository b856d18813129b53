"""The networks that this folder's measurements are made on: each with its trained weights, data in three parts, and training batches.

Trained weights are kept in out/basin/ (not committed) and trained again where they are missing or were made otherwise. Training inputs
without augmentation calibrate: GPTQ, scale search, BatchNorm statistics. The advisor reads the loss on `validation`; nothing is chosen by
`test`. Running it does nothing.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from math import nan
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from stepwell.train.corpus import Corpus, byte_batches, load_corpus, sequences
from stepwell.train.data import Digits, Images, batches, load_digits
from stepwell.train.images import Cifar, image_batches, load_cifar
from stepwell.train.loop import evaluate, fit, image_loss
from stepwell.train.models import cifar_cnn, digits_cnn, mlp
from stepwell.train.transformer import byte_loss, byte_losses, byte_transformer

CACHE = Path(__file__).parents[2] / "out" / "basin"
LENGTH = 64  # bytes that the language model reads
CHUNK = 512  # samples that are evaluated at once
BatchLoss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Training:
    """How the float weights came about: Adam with decoupled decay, the rate constant, then falling linearly to zero."""

    steps: int
    lr: float
    batch: int
    cooldown: int
    cooldown_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Subject:
    """One network; all of it is a function of its name and of the data.

    Attributes:
        name: architecture and number.
        architecture: what it shares with its twin.
        seed: of initial weights and batches.
        build: makes the network with initial weights.
        skip: parameters that stay in float.
        training: how the float weights came about.
        parts: "calibration", "validation" and "test" data, each a batch.
        samples: `samples(model, batch)` -> loss of every sample in nats, `(count,)`.
        loss: `loss(model, batch)` -> their mean, 0-dim.
        stream: `stream(steps, size, seed)` -> training batches.
        loss_terms: loss terms that a batch of training averages.
        data: what the data is, in words.
    """

    name: str
    architecture: str
    seed: int
    build: Callable[[], nn.Module]
    skip: tuple[str, ...]
    training: Training
    parts: dict[str, Any] = field(repr=False)
    samples: BatchLoss
    loss: BatchLoss
    stream: Callable[[int, int, int], Iterator[Any]]
    loss_terms: int
    data: str

    def model(self) -> nn.Module:
        """Return the network with its trained weights, in evaluation mode; trained first if it is not in the cache."""
        path, recipe = (
            CACHE / f"{self.name}.safetensors",
            json.dumps([self.name, self.seed, asdict(self.training), self.data, torch.__version__]),
        )
        model = self.build()
        if path.exists():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("recipe") == recipe:
                    model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                    return model.eval()
        self._train(model)
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, {"recipe": recipe})
        return model.eval()

    def on(self, part: str) -> Callable[[nn.Module], Tensor]:
        """Return the mean loss on a part of the data as a function of the model, for the probes."""
        return lambda model: self.loss(model, self.parts[part])

    def each(self, model: nn.Module, part: str) -> Tensor:
        """Return the loss of every sample of a part, float64, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            return torch.cat([self.samples(model, piece) for piece in pieces(self.parts[part])]).double()

    def accuracy(self, model: nn.Module, part: str) -> float:
        """Return the share of images whose largest logit is the right one; NaN for text."""
        batch = self.parts[part]
        return nan if isinstance(batch, Tensor) else evaluate(model, batch).accuracy

    def inputs(self, size: int = 128) -> list[Tensor]:
        """Return what the network reads of the calibration part, in batches."""
        return [_inputs(piece) for piece in pieces(self.parts["calibration"], size)]

    def settle_(self, model: nn.Module) -> None:
        """Re-estimate BatchNorm statistics on the calibration inputs for the weights that the model holds; without BatchNorm nothing."""
        update_bn(self.inputs(), model)
        model.eval()

    def later(self, steps: int) -> list[Any]:
        """Return the batches of every training run after the float network: the same for all of them."""
        return list(self.stream(steps, self.training.batch, 1_000_000 + self.seed))

    def _train(self, model: nn.Module) -> None:
        """Train the float weights, and settle."""
        plan = self.training
        total = plan.steps + plan.cooldown
        optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)

        def factor(step: int) -> float:
            return 1.0 if step < plan.steps else plan.cooldown_lr / plan.lr * (total - step) / plan.cooldown

        fit(model, self.stream(total, plan.batch, self.seed), optimizer=optimizer, scheduler=LambdaLR(optimizer, factor), loss=self.loss)
        self.settle_(model)


def pieces(batch: Any, size: int = CHUNK) -> list[Any]:
    """Return a batch, images or sequences, in pieces of at most so many samples."""
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    return [Images(*pair) for pair in zip(batch.pixels.split(size), batch.labels.split(size), strict=True)]


def _inputs(batch: Any) -> Tensor:
    return batch[:, :-1] if isinstance(batch, Tensor) else batch.pixels


def _image_losses(model: nn.Module, images: Images) -> Tensor:
    return cross_entropy(model(images.pixels), images.labels, reduction="none")


def _first(images: Images, count: int) -> Images:
    return Images(images.pixels[:count], images.labels[:count])


DIGITS = Training(3000, 3e-3, 64, 600, 1.5e-3, weight_decay=0.01)
BYTES = Training(1600, 3e-3, 16, 250, 1.5e-3)
CIFAR = Training(700, 4e-3, 64, 500, 4e-3, weight_decay=0.05)
SEEDS = (7301, 7302)


@cache
def _digits() -> Digits:
    return load_digits()


@cache
def _corpus() -> Corpus:
    return load_corpus()


@cache
def _cifar() -> Cifar:
    return load_cifar()


def _digits_subject(architecture: str, number: int, build: Callable[[int], nn.Module]) -> Subject:
    data, seed = _digits(), SEEDS[number]
    return Subject(
        f"{architecture}-{number}",
        architecture,
        seed,
        lambda: build(seed),
        (),
        DIGITS,
        {"calibration": data.train, "validation": data.validation, "test": data.test},
        _image_losses,
        image_loss,
        lambda steps, size, seed: batches(data, size, steps=steps, seed=seed),
        DIGITS.batch,
        "scikit-learn digits",
    )


def _bytes_subject(number: int, width: int) -> Subject:
    """Return a language model; the two train on different halves of the text and differ in width."""
    corpus, seed = _corpus(), SEEDS[number]
    half = corpus.train.chunk(2)[number]
    return Subject(
        f"bytes-lm-{number}",
        "bytes-lm",
        seed,
        lambda: byte_transformer(width=width, length=LENGTH, seed=seed),
        ("head",),
        BYTES,
        {
            "calibration": sequences(half, length=LENGTH, count=256),
            "validation": sequences(corpus.validation, length=LENGTH, count=128),
            "test": sequences(corpus.test, length=LENGTH, count=512),
        },
        byte_losses,
        byte_loss,
        lambda steps, size, seed: byte_batches(half, size=size, length=LENGTH, steps=steps, seed=seed),
        BYTES.batch * LENGTH,
        f"standard library {corpus.digest}, half {number}",
    )


def _cifar_subject(number: int) -> Subject:
    data, seed = _cifar(), SEEDS[number]
    return Subject(
        f"cifar-bn-{number}",
        "cifar-bn",
        seed,
        lambda: cifar_cnn((16, 32, 64), seed=seed),
        (),
        CIFAR,
        {"calibration": _first(data.train, 1000), "validation": _first(data.validation, 512), "test": _first(data.test, 1500)},
        _image_losses,
        image_loss,
        lambda steps, size, seed: image_batches(data.train, size, steps=steps, seed=seed),
        CIFAR.batch,
        "CIFAR-10, 10,000 training images",
    )


ARCHITECTURES: dict[str, Callable[[int], Subject]] = {
    "digits-mlp": lambda number: _digits_subject("digits-mlp", number, lambda seed: mlp((64, 64, 64, 10), seed=seed)),
    "digits-deep": lambda number: _digits_subject("digits-deep", number, lambda seed: mlp((64, *(24,) * 6, 10), seed=seed)),
    "digits-cnn": lambda number: _digits_subject("digits-cnn", number, lambda seed: digits_cnn((12, 24), seed=seed)),
    "bytes-lm": lambda number: _bytes_subject(number, (64, 48)[number]),
    "cifar-bn": _cifar_subject,
}
NAMES = tuple(f"{architecture}-{number}" for architecture in ARCHITECTURES for number in range(len(SEEDS)))


@cache
def subject(name: str) -> Subject:
    """Return a network by its name.

    Raises:
        ValueError: no such network.
        FileNotFoundError, ModuleNotFoundError: its data, or what reads it, is not there.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}: got {name!r}.")
    architecture, _, number = name.rpartition("-")
    return ARCHITECTURES[architecture](int(number))
