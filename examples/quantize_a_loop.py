"""Three lines around an unchanged training loop: a classifier at 3 bits, by rounding and by training on the grid.

python examples/quantize_a_loop.py
"""

import copy

import torch
from torch import nn

import stepwell as sw

torch.manual_seed(0)
inputs = torch.randn(2048, 64)
labels = (inputs @ torch.randn(64, 10) + 0.5 * torch.randn(2048, 10)).argmax(1)
held_in, held_out = slice(0, 1536), slice(1536, None)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """Train the way you always did."""
    for epoch in range(epochs):
        for batch in torch.randperm(1536, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[held_in][batch]), labels[held_in][batch]).backward()
            optimizer.step()


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Return the held-out loss."""
    return nn.functional.cross_entropy(model(inputs[held_out]), labels[held_out]).item()


model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), epochs=6)
print(f"full precision          {loss(model):.3f}")

q = sw.int3(block=32)
rounded = copy.deepcopy(model)
sw.ptq.rtn(rounded, q)
print(f"rounded to 3 bits       {loss(rounded):.3f}")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run = sw.attach(model, sw.lotion(q, loss_terms=64, forward="nearest"), optimizer)
train(model, optimizer, epochs=4)
encoded = run.finalize()
print(f"trained at 3 bits       {loss(model):.3f}")

sw.save(encoded, "model.safetensors")
assert all(torch.equal(sw.load("model.safetensors")[name].decode(), p) for name, p in model.named_parameters() if name in encoded)
