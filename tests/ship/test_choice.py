"""What `--method auto` makes of a verdict, and which weights a plan takes."""

import pytest
import torch
from torch import nn

import stepwell as sw
from stepwell.advice.forecast import Estimate
from stepwell.advice.verdict import Verdict, decide, safe
from stepwell.probes.stage import Cost
from stepwell.ship.choice import METHODS, method_for
from stepwell.ship.plan import plan
from stepwell.ship.quantize import Order
from stepwell.ship.spill import Spill
from stepwell.ship.targets import known, route, widths


def verdict(*estimates, tolerance=0.1):
    """The verdict that `advise` gives for these estimates."""
    method, one = decide(estimates, tolerance)
    sure = safe(estimates, tolerance)
    interval = (one.increase, one.low, one.high)
    return Verdict(method, *interval, ("because",), Cost(0), "int4", tolerance, 1.0, tuple(estimates), 1.0, sure, 0.9)


GOOD, BAD, OPEN = (0.01, 0.0, 0.02), (0.5, 0.4, 0.6), (0.1, 0.05, 0.2)


@pytest.mark.parametrize(
    ("rtn", "gptq", "train", "method"),
    [
        (GOOD, None, None, "rtn"),
        (BAD, GOOD, None, "gptq"),
        (BAD, BAD, GOOD, "default"),
        (BAD, BAD, BAD, "default"),  # nothing stronger is known
        (OPEN, GOOD, None, "gptq"),  # uncertain, but something surely is enough
        (OPEN, BAD, BAD, "gptq"),  # uncertain: the next stronger one
        (BAD, OPEN, BAD, "default"),
        (BAD, BAD, OPEN, "default"),
    ],
)
def test_auto_takes_the_cheapest_method_that_is_surely_enough(rtn, gptq, train, method):
    given = zip(("RTN", "GPTQ", "train"), (rtn, gptq, train), strict=True)
    found = method_for(verdict(*(Estimate(name, *one, name != "train") for name, one in given if one is not None)), 0.1)
    assert found.method == method
    assert found.method in METHODS
    assert found.why[0].startswith("advise: ")
    assert found.why[-1] == "because"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.conv = nn.Conv2d(4, 8, 4)  # 64 inputs
        self.good = nn.Linear(64, 8)
        self.narrow = nn.Linear(40, 8)
        self.norm = nn.LayerNorm(8)


def test_every_matrix_has_a_grid_or_a_reason():
    found = plan(Odd(), sw.int4(block=32))
    assert list(found.grids) == ["conv.weight", "good.weight"]
    assert found.floats == {"embed.weight": "embedding", "narrow.weight": "blocks of 32 do not divide its shape 8x40"}
    assert found.elements == 8 * 64 * 2
    assert found.total == sum(parameter.numel() for parameter in Odd().parameters())
    found = plan(Odd(), sw.int4(block=32), matrices=True, target="x", skip=["narrow"])
    assert list(found.grids) == ["good.weight"]
    assert found.floats["conv.weight"] == "4 dimensions: x holds matrices"
    assert found.floats["narrow.weight"] == "skipped by name"
    given = plan(Odd(), {"good.weight": sw.int8(block=8), "narrow.weight": sw.int4(block=8)})
    assert {name: grid.format.bits for name, grid in given.grids.items()} == {"good.weight": 8, "narrow.weight": 4}
    with pytest.raises(ValueError, match=r"no weight is left to quantize \(.*conv.weight: blocks of 48"):
        plan(Odd(), sw.int4(block=48))


def test_a_plan_of_a_model_without_memory_is_the_same():
    with torch.device("meta"):
        model = Odd()
    assert plan(model, sw.int4(block=32)) == plan(Odd(), sw.int4(block=32))


def test_every_known_target_has_a_route_and_a_grid():
    assert len(known()) > 20
    for name in known():
        assert route(name).serve.format(path="PATH").count("PATH") >= 1
        assert Order(name, "rtn").grid == sw.target(name)
    for name in ("onnx", "gguf", "nothing:int4", ""):
        with pytest.raises(ValueError, match="`target` must be one of"):
            _ = Order(name, "rtn").grid


@pytest.mark.parametrize(
    ("target", "bits"),
    [
        ("safetensors", [2, 3, 4, 5, 6, 7, 8]),
        ("onnx:matmulnbits", [2, 4, 8]),
        ("compressed-tensors:int4", [2, 3, 4, 8]),
        ("torchao", [2, 3, 4, 8]),
        ("gguf:q4_0", [4, 8]),
    ],
)
def test_layers_choose_among_the_integers_that_one_file_holds(target, bits):
    assert [grid.format.bits for grid in widths(target, block=None)] == bits


def test_what_is_spilled_comes_back_and_can_be_replaced(tmp_path):
    store = Spill(tmp_path / "spill")
    weights = {f"a/b.{k}": grid.encode(torch.randn(4, 32)) for k, grid in enumerate((sw.int4(), sw.nvfp4(), sw.intn(2, levels="affine")))}
    store.update(weights)
    assert list(store) == list(weights)
    for name, weight in weights.items():
        found = store[name]
        assert found.quantizer == weight.quantizer
        assert torch.equal(found.decode(), weight.decode())
        assert torch.equal(found.codes, weight.codes)
    store["a/b.0"] = weights["a/b.1"]
    assert torch.equal(store["a/b.0"].codes, weights["a/b.1"].codes)
    del store["a/b.0"]
    assert len(store) == len(list((tmp_path / "spill").iterdir())) == 2
