"""Small networks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

LEAK = 0.1  # of the ReLUs where no normalisation keeps units alive


def mlp(widths: Sequence[int], *, seed: int) -> nn.Sequential:
    """Return Linear layers `fc1`, `fc2`, ... with leaky ReLUs between them, initialised from `seed` alone.

    A unit that never fires has no gradient and hence no curvature; the leak (0.1) keeps every weight's curvature above zero.

    Args:
        widths: inputs, hidden widths, outputs: at least two; many narrow ones make a network that rounding breaks at 4 bits.
        seed: of the initial weights; the global random state is left as it was.
    """
    if len(widths) < 2:
        raise ValueError(f"`widths` must hold inputs and outputs: got {tuple(widths)}. Pass for instance (64, 64, 10).")

    def layers() -> OrderedDict[str, nn.Module]:
        found: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            found[f"fc{index}"] = nn.Linear(inputs, outputs)
            if index < len(widths) - 1:
                found[f"act{index}"] = nn.LeakyReLU(LEAK)
        return found

    return _seeded(layers, seed)


def digits_cnn(channels: Sequence[int], *, seed: int) -> nn.Sequential:
    """Return a network of 3x3 convolutions for 8x8 digits, `(count, 64)` -> `(count, 10)`; each halves the sides by its pooling.

    Args:
        channels: of the convolutions `conv1`, `conv2`, ..: one to three.
        seed: of the initial weights; the global random state is left as it was.
    """
    if not 1 <= len(channels) <= 3:
        raise ValueError(f"`channels` must name one to three convolutions, 8 pixels halve no more often: got {tuple(channels)}.")

    def layers() -> OrderedDict[str, nn.Module]:
        found: OrderedDict[str, nn.Module] = OrderedDict(image=nn.Unflatten(1, (1, 8, 8)))
        for index, (inputs, outputs) in enumerate(pairwise((1, *channels)), start=1):
            found[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
            found[f"act{index}"], found[f"pool{index}"] = nn.LeakyReLU(LEAK), nn.MaxPool2d(2)
        found["flat"], side = nn.Flatten(), 8 >> len(channels)
        found["fc"] = nn.Linear(channels[-1] * side * side, 10)
        return found

    return _seeded(layers, seed)


def cifar_cnn(channels: Sequence[int], *, seed: int) -> nn.Sequential:
    """Return a network of 3x3 convolutions with BatchNorm for 32x32 colour images, `(count, 3, 32, 32)` -> `(count, 10)`.

    BatchNorm, a ReLU and a pooling that halves the sides follow every convolution; a Linear layer reads the 2x2 means left over.

    Args:
        channels: of the convolutions `conv1`, `conv2`, ..: one to four.
        seed: of the initial weights; the global random state is left as it was.
    """
    if not 1 <= len(channels) <= 4:
        raise ValueError(f"`channels` must name one to four convolutions, 32 pixels halve to 2 in four: got {tuple(channels)}.")

    def layers() -> OrderedDict[str, nn.Module]:
        found: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (inputs, outputs) in enumerate(pairwise((3, *channels)), start=1):
            found[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)  # BatchNorm would take its bias away again
            found[f"norm{index}"], found[f"act{index}"] = nn.BatchNorm2d(outputs), nn.ReLU()
            found[f"pool{index}"] = nn.MaxPool2d(2)
        found["mean"], found["flat"] = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        found["fc"] = nn.Linear(4 * channels[-1], 10)
        return found

    return _seeded(layers, seed)


def _seeded(layers: Callable[[], OrderedDict[str, nn.Module]], seed: int) -> nn.Sequential:
    """Return layers that are initialised from a seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(layers())
