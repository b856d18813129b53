"""Small networks, data, optimizers and methods that the tests of the Run share."""

import torch
from tests.cases import seeded
from torch import nn

import stepwell as sw

QUANTIZED = ["0.weight", "2.weight", "4.weight"]


def network(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return 32 -> 48 -> 32 -> 4, of which three weights are quantized."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)


def batches(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Return `count` pairs of inputs `(16, 32)` and targets `(16, 4)`, the same for the same seed whatever the count."""
    generator = seeded(seed)
    return [tuple(torch.randn(16, size, generator=generator, dtype=torch.float64).to(dtype) for size in (32, 4)) for _ in range(count)]


def train(model: nn.Module, optimizers, data, *, loss=nn.functional.mse_loss) -> list[float]:
    """Run the plain loop; return the losses."""
    found = []
    steppers = optimizers if isinstance(optimizers, list) else [optimizers]
    for inputs, targets in data:
        model.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        for optimizer in steppers:
            optimizer.step()
        found.append(value.item())
    return found


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def latents(run: sw.Run, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter with the latent weights shown."""
    with run.latent():
        return weights(model)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries hold the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def ones(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a curvature of one for every parameter."""
    return {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd momentum foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, foreach=True),
    "sgd momentum fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam for-loop": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, foreach=False),
    "adamw for-loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "stepwell adamw": lambda p: sw.optim.AdamW(p, lr=0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
}
MOMENTS = [name for name in OPTIMIZERS if "sgd" not in name]
