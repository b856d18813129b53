"""Small networks."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(widths: Sequence[int], *, seed: int) -> nn.Sequential:
    """Return Linear layers `fc1`, `fc2`, ... with leaky ReLUs between them, initialised from `seed` alone.

    A unit that never fires has no gradient and hence no curvature; the leak (0.1) keeps every weight's curvature above zero.

    Args:
        widths: inputs, hidden widths, outputs: at least two.
        seed: of the initial weights; the global random state is left as it was.
    """
    if len(widths) < 2:
        raise ValueError(f"`widths` must hold inputs and outputs: got {tuple(widths)}. Pass for instance (64, 64, 10).")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers[f"fc{index}"] = nn.Linear(inputs, outputs)
            if index < len(widths) - 1:
                layers[f"act{index}"] = nn.LeakyReLU(0.1)
    return nn.Sequential(layers)
