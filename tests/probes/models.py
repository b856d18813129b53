"""Models whose loss is known in closed form, and small real ones, for the tests of the probes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepwell.formats import integer
from stepwell.quantizers import Quantizer

UNIT = Quantizer(integer(4), rule=1.0)  # the integers -7..7


def row(values: list[float] | Tensor) -> nn.Linear:
    """One layer without bias that holds the given weights in one row, float64."""
    weight = torch.as_tensor(values, dtype=torch.float64)[None]
    layer = nn.Linear(weight.shape[1], 1, bias=False).double()
    layer.weight.data = weight.clone()
    return layer


class Quadratic:
    """L(w) = offset + 1/2 (w - centre)^T H (w - centre), for all weights of a model in one flat vector."""

    def __init__(self, hessian: Tensor, centre: Tensor, offset: float = 0.5):
        self.hessian, self.centre, self.offset, self.calls = hessian.double(), centre.double(), offset, 0

    def __call__(self, model: nn.Module) -> Tensor:
        self.calls += 1
        away = torch.cat([p.flatten() for p in model.parameters()]) - self.centre
        return self.offset + away @ self.hessian @ away / 2


def positive(size: int, seed: int) -> Tensor:
    """A random positive definite matrix."""
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw @ draw.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Everything(nn.Module):
    """Convolution, BatchNorm, dropout, a frozen layer: all the state that a probe could disturb."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.drop, self.frozen, self.head = nn.Dropout(0.5), nn.Linear(36, 12), nn.Linear(12, 5)
        self.norm.running_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
        self.norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)
        return self.head(torch.relu(self.frozen(x)))


class Batch:
    """Cross entropy on fixed random images, counting calls and backward passes."""

    def __init__(self, count: int = 24, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 1, 3, 3, generator=generator)
        self.y = torch.randint(5, (count,), generator=generator)
        self.calls = self.backwards = 0

    def __call__(self, model: nn.Module) -> Tensor:
        self.calls += 1
        value = cross_entropy(model(self.x), self.y)
        if value.requires_grad:
            value.register_hook(self._count)
        return value

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1
