"""The bases that the comparison of methods could start from: each is the network of the protocol, and is held against the same rows."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stepwell.methods.distill import plain
from stepwell.train.transformer import Block

ROOT = Path(__file__).parents[2]
QUANTIZED, ABOUT = 147_456, (180_000, 190_000)  # weights of the blocks' Linear layers; parameters of the whole network


@pytest.fixture(scope="module", autouse=True)
def on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def test_every_base_is_the_network_of_the_protocol():
    from estimating.bases import variants

    tokens = torch.arange(128).view(2, 64)
    for name, base in variants().items():
        model = base.build(0)
        inner = [layer for part, layer in model.named_modules() if isinstance(layer, nn.Linear) and part != "head"]
        assert sum(layer.weight.numel() for layer in inner) == QUANTIZED, name
        trained = [one for one in model.parameters() if one.requires_grad]
        assert ABOUT[0] < sum(one.numel() for one in trained) < ABOUT[1], name
        known = {id(one) for group in base.optimizer(model, 1e-3).param_groups for one in group["params"]}
        assert {id(one) for one in trained} <= known, name
        logits = model(tokens)
        assert torch.equal(base.build(0)(tokens), logits), name
        assert not torch.equal(base.build(1)(tokens), logits), name


def test_blocks_of_other_kinds_hold_the_same_attention():
    from estimating.bases import PostNorm, Rectified

    torch.manual_seed(0)
    ours, x = Block(64, 4), torch.randn(2, 8, 64)
    for part in (ours.down.weight, ours.down.bias):
        nn.init.zeros_(part)  # what is left is the attention's
    rectified, after = Rectified(64, 4), PostNorm(64, 4)
    for block in (rectified, after):
        block.load_state_dict(ours.state_dict())
    assert torch.equal(rectified(x), ours(x))
    normed = nn.functional.layer_norm(x, (64,))  # a fresh norm has no gain of its own: norm1 is idempotent up to its epsilon
    expected = nn.functional.layer_norm(nn.functional.layer_norm(normed + (ours(normed) - normed), (64,)), (64,))
    torch.testing.assert_close(after(normed), expected, rtol=0, atol=1e-3)


def test_clipping_bounds_what_a_step_moves():
    from estimating.lab import network, step

    batch = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(0))
    moved = []
    for clip in (math.inf, 0.01):
        model = network(0)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        step(model, SGD(model.parameters(), lr=1.0), batch, plain, clip)
        moved.append(float((nn.utils.parameters_to_vector(model.parameters()).detach() - before).norm()))
    assert moved[0] > 0.1
    assert moved[1] == pytest.approx(0.01, rel=1e-2)  # of float32 weights near 1 that move by 1e-5


def test_distance_is_a_typical_factor():
    import estimators_bases as bases

    def entries(factor):
        floors = {rate: bases.TRIAL["full precision", rate, 32] for rate in bases.RATES}
        return [bases.Entry("x", *key, 3 + factor * (loss - floors[key[1]]), loss) for key, loss in bases.TRIAL.items()]

    assert bases.distance(entries(1)) == pytest.approx(0, abs=1e-9)
    assert bases.distance(entries(2)) == pytest.approx(math.log(2))
    assert bases.distance(entries(0.5)) == pytest.approx(math.log(2))


def test_every_base_has_files_of_its_own():
    import estimators
    from estimating.bases import variants
    from estimating.lab import OURS, Lab

    written = {name: estimators.file(Lab(base), ".csv") for name, base in variants().items()}
    assert written[OURS.name] == ROOT / "benchmarks" / "results" / "estimators.csv"
    assert len(set(written.values())) == len(written)
    assert all(estimators.file(Lab(base), "_table.csv") != one for base in variants().values() for one in written.values())
