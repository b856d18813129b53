"""Loss terms, the theory's N: Adam's second moment times the terms of a step is the curvature of the mean loss.

At weights whose own probabilities draw the labels, gradients of single terms have mean zero and the Gauss-Newton diagonal H as mean square,
so a mean over N terms has H / N: over all of a step's micro-batches, and, as the two-rank tests compare with one process, over all ranks.
"""

import pytest
import torch
from tests.cases import seeded
from torch import nn
from torch.nn.functional import cross_entropy

import stepwell as sw

STEPS, MICRO = 400, 8


def curvature(model, inputs):
    """The Gauss-Newton diagonal of the mean loss, `(outputs, inputs)`: mean x^2 p (1 - p)."""
    p = model(inputs).softmax(1)
    return torch.einsum("ni,nj->ij", p * (1 - p), inputs.square()) / len(inputs)


@pytest.mark.parametrize("counts", [(8,), (32,), (24, 24, 24, 16)], ids=["one batch", "four micro-batches", "an uneven last batch"])
def test_second_moment_times_terms_is_the_curvature(counts):
    """With uneven steps the product at a step of N terms is N times the mean of 1 / N: 1.125 at the three full steps of these four.

    The mean of the ratio over 40 weights and 400 steps has a relative standard error of (2 / 16000)^1/2 = 1.1 %; five of these pass.
    """
    torch.manual_seed(0)
    model, generator = nn.Linear(8, 5, bias=False, dtype=torch.float64), seeded(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-9))  # a plain mean of squares
    run = sw.attach(model, sw.lotion(sw.int8(block="channel")), optimizer)
    with torch.no_grad():
        expected = curvature(model, torch.randn(20_000, 8, generator=generator, dtype=torch.float64))
    for step in range(STEPS):
        terms = counts[step % len(counts)]
        inputs = torch.randn(terms, 8, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            labels = torch.multinomial(model(inputs).softmax(1), 1, generator=generator).squeeze(1)
        optimizer.zero_grad()
        for x, y in zip(inputs.split(MICRO), labels.split(MICRO), strict=True):
            (cross_entropy(model(x), y, reduction="sum") / terms).backward()
        run.loss_terms = terms
        optimizer.step()
    square = optimizer.state[model.weight]["exp_avg_sq"] / (1 - (1 - 1e-9) ** STEPS)
    factor = counts[0] * sum(1 / count for count in counts) / len(counts)
    assert float((counts[0] * square / expected).mean()) == pytest.approx(factor, rel=0.055)
