"""Draws are a function of seed, step, name and place, and are uniform."""

import pytest
import torch
from scipy import stats

from stepwell.randomness import stream, uniform

# The published first outputs of splitmix64 for seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
SPLITMIX = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)], ids=str)
def test_the_bits_are_those_of_splitmix64(dtype, bits):
    drawn = uniform(1234567, (5,), offset=1, dtype=dtype)  # splitmix64 steps once before its first output
    assert [int(value * 2**bits) for value in drawn.double()] == [word >> (64 - bits) for word in SPLITMIX]


def test_a_part_draws_what_the_whole_draws_there():
    key = stream(0, 3, "layers.0.weight")
    whole = uniform(key, (6, 10))
    assert torch.equal(uniform(key, (2, 10), offset=20), whole[2:4])
    assert torch.equal(uniform(key, (60,)), whole.flatten())
    assert torch.equal(torch.cat([uniform(key, (1,), offset=k) for k in range(60)]), whole.flatten())


def test_seed_step_and_name_each_make_another_stream():
    keys = {stream(seed, step, name) for seed in range(4) for step in range(50) for name in ("a", "b", "a.b", "")}
    assert len(keys) == 4 * 50 * 4
    assert stream(1, 23, "w") != stream(12, 3, "w")
    assert stream(0, 0, "w") == stream(0, 0, "w")
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_are_uniform_and_neighbouring_streams_uncorrelated(dtype):
    drawn = torch.stack([uniform(stream(0, step, "w"), (20000,), dtype=dtype) for step in range(4)]).double()
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    for row in drawn:
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-4  # fixed seeds: five such tests fail by chance once in 2000 choices
    correlation = torch.corrcoef(torch.cat([drawn[:, :-1], drawn[:1, 1:]]))  # between steps, and with itself one element on
    off = correlation - torch.eye(len(correlation))
    assert float(off.abs().max()) < 5 / 20000**0.5  # standard error 1 / sqrt(n)
