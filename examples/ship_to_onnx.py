"""Train on the grid that onnxruntime holds, export, and prove that what was trained is what runs.

pip install "stepwell[onnx]" && python examples/ship_to_onnx.py
"""

import torch
from torch import nn

import stepwell as sw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run = sw.attach(model, sw.ste(sw.target("onnx:matmulnbits")), optimizer)

target = nn.Linear(64, 10)
for _ in range(50):
    x = torch.randn(128, 64)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), target(x).detach()).backward()
    optimizer.step()

encoded = run.finalize()
example = (torch.randn(4, 64),)
sw.export.onnx(model.eval(), encoded, example, "model.onnx")
certificate = sw.verify("model.onnx", model, example, encoded=encoded)
print(certificate)
assert certificate.passed
