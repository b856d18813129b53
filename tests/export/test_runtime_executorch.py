"""ExecuTorch runs what was trained, by its portable kernels and by XNNPACK's. Optional: pip install executorch.

There is no export to its files here: torch's own lowering takes a model with its grid weights in place and stores them as float32 values.
"""

import numpy as np
import pytest
import torch
from torch import nn

import stepwell as sw

from .conftest import Language

exir = pytest.importorskip("executorch.exir")
pytestmark = pytest.mark.slow


def mlp():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10)), torch.randn(5, 64)


def network():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]
    return nn.Sequential(*layers), torch.randn(4, 3, 8, 8)


def transformer():
    return Language(), torch.randint(48, (2, 7))


def lowered(model: nn.Module, x: torch.Tensor, backend: str) -> bytes:
    """Return the program as ExecuTorch stores it."""
    program = torch.export.export(model, (x,))
    if backend == "portable":
        return bytes(exir.to_edge(program).to_executorch().buffer)
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return bytes(exir.to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
@pytest.mark.parametrize("make", [mlp, network, transformer])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_model_on_the_grid_runs_as_it_does_in_torch(make, backend, bits):
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    model, x = make()
    model.eval()
    encoded = sw.ptq.rtn(model, sw.intn(bits, block="channel"))
    with torch.no_grad():
        reference = model(x)
    stored = lowered(model, x, backend)
    found = Runtime.get().load_program(stored).load_method("forward").execute([x])[0]
    error = (found - reference).abs().max() / reference.abs().max()
    assert error < 5e-6  # both sum in float32, in another order each
    for name, weight in encoded.items():
        if backend == "portable" and weight.codes.ndim == 2 and "in_proj" not in name:
            assert np.ascontiguousarray(weight.decode().numpy()).tobytes() in stored, name
