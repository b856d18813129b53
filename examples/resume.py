"""Stop and go on: `model.state_dict()` and `optimizer.state_dict()` are all that a quantized run needs.

python examples/resume.py
"""

import torch
from torch import nn

import stepwell as sw


def build() -> tuple[nn.Module, torch.optim.Optimizer, sw.Run]:
    """Build, attach; load after that."""
    torch.manual_seed(0)
    model = nn.Linear(32, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, sw.attach(model, sw.ste(sw.int2(block=16)), optimizer)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    """One training step on batch k."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad()
    (model(x) - x[:, :8]).square().mean().backward()
    optimizer.step()


model, optimizer, run = build()
for k in range(10):
    step(model, optimizer, k)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
for k in range(10, 20):
    step(model, optimizer, k)

resumed, optimizer_again, run_again = build()
saved = torch.load("checkpoint.pt", weights_only=True)
resumed.load_state_dict(saved["model"])
optimizer_again.load_state_dict(saved["optimizer"])
for k in range(10, 20):
    step(resumed, optimizer_again, k)

assert run_again.steps == 20
with run.latent(), run_again.latent():
    assert torch.equal(model.weight, resumed.weight)
print(f"resumed run ends on identical weights: {run_again!r}")
