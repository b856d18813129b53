"""Ask why rounding fails on a model of your own, which weights hurt, what is near, and which method will do.

pip install stepwell && python examples/explain_a_model.py

The same as a page with figures: stepwell explain examples/explain_a_model.py:subject --bits 8,3,2
"""

from itertools import cycle, islice

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw


def subject():
    """Return a trained model, the loss of one batch, and batches that it was not trained on."""
    torch.manual_seed(0)
    mix = torch.randn(16, 3)

    def draw(count):
        inputs = [torch.randn(64, 16) for _ in range(count)]
        return [(x, (x @ mix).argmax(1)) for x in inputs]

    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for batch in islice(cycle(draw(40)), 400):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model, loss, draw(9)


def loss(model, batch):
    """Return the mean loss of one batch, as a tensor."""
    return cross_entropy(model(batch[0]), batch[1])


if __name__ == "__main__":
    model, loss, batches = subject()
    grids = [sw.intn(bits, block="channel", scale="mse") for bits in (8, 3, 2)]
    told = sw.explain.measure(model, loss, batches, quantizers=grids, tolerance=0.1, effort=sw.explain.QUICK)
    for report in told.grids:
        print(f"{report.bits} bits: RTN {report.rtn.increase:+.3f}, GPTQ {report.gptq.increase:+.3f}, {report.verdict}")
        if report.closer is not None:  # of the widest grid on which rounding fails
            print("   hurts most:", report.closer.layers[0].name)
            print("   low-loss grid point near:", "found" if any(one.within for one in report.closer.searches) else "not found")
