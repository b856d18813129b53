"""Exported files shared by the tests of this folder: each is traced once per session."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.export.exported import Exported
from stepwell.quantizers import Encoded, Quantizer

GRID = sw.target("onnx:matmulnbits")


class Case(NamedTuple):
    model: nn.Module
    encoded: dict[str, Encoded]
    example: tuple[torch.Tensor, ...]
    path: Path
    exported: Exported


class Tied(nn.Module):
    """One Linear called twice, and a second module that shares its weight but not its bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.first(x).relu()).relu())


class Language(nn.Module):
    """Token model: an embedding, packed attention projections, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)))


class Conv1D(nn.Module):
    """GPT-2's layer: a Linear whose weight is stored as (in, out); recognised by its name."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Twins(nn.Module):
    """Two layers of equal weights on the same input, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.idle = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False), nn.Linear(32, 16)
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x):
        return self.one(x) + 2 * self.two(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 10, bias=False))


def skewed() -> nn.Sequential:
    """Return an mlp whose rows lie off zero by different amounts, so that zero points differ."""
    model = mlp()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight += torch.linspace(-0.2, 0.2, layer.out_features)[:, None]
    return model


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


# name -> model, grid, example's shape (int: token ids), sequence axis
RECIPES: dict[str, tuple[Callable[[], nn.Module], Quantizer | Mapping[str, Quantizer], tuple[int, ...], int | None]] = {
    "mlp": (mlp, GRID, (3, 64), None),
    "symmetric, one row": (mlp, sw.int4(block=16), (1, 64), None),
    "8 bits and affine": (skewed, {"0.*": sw.int8(block=64), "*": sw.int4(levels="affine")}, (3, 64), None),
    "8 bits affine, channel": (skewed, {"0.*": sw.int8(levels="affine"), "*": sw.int4(block="channel")}, (3, 64), None),
    "three dimensions": (mlp, GRID, (1, 5, 64), 1),
    "tied": (Tied, GRID, (3, 64), None),
    "language": (Language, {"embedding.weight": GRID, "*": GRID}, (2, 7), 1),
    "Conv1D": (lambda: nn.Sequential(Conv1D(64, 48), nn.GELU(), Conv1D(48, 10)), sw.int4(block=16, levels="affine"), (3, 64), None),
    "convolution": (network, {"5.*": GRID, "*": sw.ternary(block="channel")}, (2, 1, 8, 8), None),
    "twins": (Twins, sw.int4(), (3, 32), None),
}


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Callable[[str], Case]:
    """Return a function from the name of a recipe to its exported file."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            build, grid, shape, sequence = RECIPES[name]
            torch.manual_seed(0)
            model = build().train()
            example = (torch.randint(48, shape),) if name == "language" else (torch.randn(shape),)
            encoded = sw.ptq.rtn(model, grid)
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            made[name] = Case(model, encoded, example, path, sw.export.onnx(model, encoded, example, path, sequence=sequence))
        return made[name]

    return make


def run(path: Path, *inputs: torch.Tensor) -> np.ndarray:
    """Run a file as a user would, without any of our code."""
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {part.name: value.numpy() for part, value in zip(session.get_inputs(), inputs, strict=True)})[0]


def expected(model: nn.Module, encoded: Mapping[str, Encoded], *inputs: torch.Tensor) -> torch.Tensor:
    """Return what the model with the grid weights computes, from a copy."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, weight in encoded.items():
            dict(twin.named_parameters(remove_duplicate=False))[name].copy_(weight.decode())
        return twin(*inputs)
