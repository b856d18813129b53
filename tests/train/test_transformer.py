"""The byte-level language model: causal, of the size it says, its attention equal to the sum written out, its loss the definition."""

import math

import pytest
import torch

import stepwell as sw
from stepwell.train.transformer import byte_loss, byte_losses, byte_transformer


def tokens(count, length, seed=0):
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def test_a_byte_changes_only_what_comes_after_it():
    model = byte_transformer(width=16, layers=2, heads=2, length=12, seed=0).eval()
    one = tokens(1, 12)
    two = one.clone()
    two[0, 7] = (two[0, 7] + 1) % 256
    with torch.no_grad():
        gap = (model(one) - model(two)).abs().amax(2)[0]
    assert gap[:7].max() < 1e-6  # float32 logits of order one
    assert gap[7:].min() > 1e-4


def test_a_block_is_its_formula():
    model = byte_transformer(width=8, layers=1, heads=2, length=5, seed=3)
    block, x = model.blocks[0], torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    normed = torch.nn.functional.layer_norm(x, (8,))  # its gain starts at 1 and its bias at 0
    query, key, value = block.qkv(normed).chunk(3, dim=2)
    mixed = torch.zeros_like(x)
    for head in (slice(0, 4), slice(4, 8)):
        for at in range(5):
            scores = (key[:, : at + 1, head] @ query[:, at, head, None])[..., 0] / math.sqrt(4)
            mixed[:, at, head] = (scores.softmax(1)[..., None] * value[:, : at + 1, head]).sum(1)
    after = x + block.out(mixed)
    hidden = block.up(torch.nn.functional.layer_norm(after, (8,)))
    expected = after + block.down(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    torch.testing.assert_close(block(x), expected)


def test_block_weights_alone_are_quantized_and_there_are_as_many_as_said():
    model = byte_transformer(seed=0)
    selected = sw.select(model, sw.int4(), skip=["head"]).chosen
    assert {row.name.rsplit(".", 2)[1] for row in selected} == {"qkv", "out", "up", "down"}
    assert sum(row.parameter.numel() for row in selected) == 3 * 12 * 64**2 == 147_456


def test_losses_are_nats_per_byte_of_each_sequence():
    model, sequences = byte_transformer(width=16, layers=1, heads=2, length=6, seed=0), tokens(4, 7)
    logits = model(sequences[:, :-1]).double().log_softmax(2)
    expected = [-sum(logits[row, at, sequences[row, at + 1]] for at in range(6)).item() / 6 for row in range(4)]
    assert byte_losses(model, sequences).tolist() == pytest.approx(expected, rel=1e-5)
    assert byte_loss(model, sequences).item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    # fresh logits are small, so the loss is near that of guessing: ln 256 = 5.545, plus half their variance, which is below .5
    assert sum(expected) / 4 == pytest.approx(math.log(256), abs=0.5)


def test_seed_alone_sets_the_weights_and_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = (byte_transformer(width=8, layers=1, heads=2, length=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="`heads` must divide `width`: got 3 for 64"):
        byte_transformer(heads=3, seed=0)
