"""Training runs on a frozen grid: straight-through, LOTION, and the float control, on the same batches. Running it does nothing.

Only the quantized weights move; biases, norms and embeddings stay, and BatchNorm statistics stay those of the float network. Adam, its rate
falling to zero by a cosine. Scales are those of rounding to nearest at the float weights, unless a run is said to refit them.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from subjects import Subject
from torch import Tensor, nn

import stepwell as sw
from stepwell.methods.base import Method
from stepwell.quantizers import Encoded, Quantizer
from stepwell.run.attach import Run

Look = Callable[[int, nn.Module, Run | None], None]  # (steps done, the model as the forward pass sees it, the run)


class Grid(NamedTuple):
    """One network on one grid.

    Attributes:
        subject: the network.
        model: its float weights; nobody changes them.
        quantizer: the grid.
        centre: the float weights rounded to nearest, whose scales are frozen.
    """

    subject: Subject
    model: nn.Module
    quantizer: Quantizer
    centre: dict[str, Encoded]


def frozen(method: Method) -> Method:
    """Return a method whose scales stay what they are where training begins."""
    return method._replace(init=lambda weight, quantizer: {"scale": quantizer.fit(weight).scale})


def train(
    subject: Subject,
    model: nn.Module,
    names: Sequence[str],
    method: Method | Mapping[str, Method] | None,
    data: Sequence[Any],
    *,
    rate: float,
    looks: Mapping[int, Look] | None = None,
) -> dict[str, Tensor]:
    """Return the latent weights after one pass over the batches; the model is not changed.

    Args:
        subject: whose loss is trained on.
        model: where training begins.
        names: the weights that move.
        method: one for all, or by name; None trains in float.
        data: a batch per step.
        rate: Adam's, before the cosine.
        looks: steps done -> what to call then.
    """
    model = copy.deepcopy(model).requires_grad_(False).eval()
    weights = [model.get_parameter(name).requires_grad_(True) for name in names]
    optimizer = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / len(data))) / 2)
    run = (
        None
        if method is None
        else sw.attach(model, method, optimizer, skip=() if isinstance(method, Mapping) else subject.skip, compile=False)
    )
    for step in range(len(data) + 1):
        if looks and step in looks:
            looks[step](step, model, run)
        if step == len(data):
            break
        optimizer.zero_grad()
        subject.loss(model, data[step]).backward()
        optimizer.step()
        schedule.step()
    if run is not None:
        run.detach(keep="latent")
    return {name: weight.detach().clone() for name, weight in zip(names, weights, strict=True)}


def on_grid(weights: Mapping[str, Tensor], centre: Mapping[str, Encoded]) -> dict[str, Encoded]:
    """Return weights rounded to nearest with the scales of others."""
    return {name: one.quantizer.encode(weights[name], scale=one.scales) for name, one in centre.items()}


def holding(model: nn.Module, weights: Mapping[str, Encoded | Tensor]) -> nn.Module:
    """Return a copy of a model with other weights in place."""
    held = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            held.get_parameter(name).copy_(weight.decode() if isinstance(weight, Encoded) else weight)
    return held
