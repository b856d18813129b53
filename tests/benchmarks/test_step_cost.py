"""The benchmark of the training step times every method there is, on the path that a user gets."""

from pathlib import Path

import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.run import fused, fused_held
from stepwell.run.managed import Managed

ROOT = Path(__file__).parents[2]
NO_METHOD = {"__init__", "base", "distill"}  # what a loss learns from a teacher is the loop's


@pytest.fixture(scope="module")
def every():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import step_cost

        return step_cost.every()


def test_every_file_of_methods_has_a_row(every):
    """A method's functions say which files it is made of."""
    used = set()
    for method in every.values():
        for part in (method.deploy, method.gradient, method.push, method.prox, method.init):
            used |= {getattr(part, "__module__", ""), getattr(getattr(part, "function", None), "__module__", ""), type(part).__module__}
    files = {path.stem for path in (ROOT / "src" / "stepwell" / "methods").glob("*.py")} - NO_METHOD
    thin = {"faster", "lsq", "ste"}  # made of the pieces of others, or of `base`
    assert {f"stepwell.methods.{file}" for file in files - thin} <= used
    assert {"faster", "lsq", "ste", "default"} <= set(every)


def test_every_row_is_served_by_kernels(every):
    pytest.importorskip("numba")
    for name, method in every.items():
        layer = nn.Linear(64, 8, bias=False)
        one = Managed("weight", layer.weight, method, method.quantizer, torch.optim.AdamW(layer.parameters()))
        assert fused.serves(one) or fused_held.serves(one), name
        assert one.quantizer.block == sw.int4(block=32).block, name
