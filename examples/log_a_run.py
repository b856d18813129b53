"""Watch a quantized run from inside: is the rounded model in the basin, which way does its gradient point, what do the weights do?

python examples/log_a_run.py
"""

import torch
from torch import nn

import stepwell as sw

torch.manual_seed(0)
inputs = torch.randn(2048, 64)
labels = (inputs @ torch.randn(64, 10) + 0.5 * torch.randn(2048, 10)).argmax(1)
probe = (inputs[1536:], labels[1536:])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train the way you always did."""
    for step in range(steps):
        batch = torch.randint(1536, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()


def loss(model: nn.Module) -> torch.Tensor:
    """The same data at every look."""
    return nn.functional.cross_entropy(model(probe[0]), probe[1])


model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 150)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run = sw.attach(model, sw.ste(sw.int2(block=32)), optimizer)
log = sw.probes.Log(run, loss)  # looks at steps 0, 1, 2, 4, 8, .. and at the end; the loop does not know
train(model, optimizer, 300)
encoded = run.finalize()

print(log)
inside = "never" if log.entry is None else f"first at step {log.entry}, {log.stay:.0%} of the looks after that"
print(f"within tolerance: {inside}; best {log.best.loss:.3f} at step {log.best.step}")
outside = sw.probes.contrast(log.looks)
print(f"gradient points back to the float weights at {outside.inward_outside:.0%} of the {outside.outside} looks outside")
log.csv("log.csv")
assert log.looks[-1].step == 300
assert log.best.loss < log.rounded
