"""Two FSDP2 ranks (gloo, on the CPU) train what one process trains: losses, codes, draws, and resuming from a whole state."""

import pytest
import torch
from tests.run.sharded_worker import STOP, attach, data, looked, methods, network, steps

from stepwell import randomness


@pytest.mark.parametrize("name", methods())
def test_two_ranks_equal_one_process(ranks, name):
    """Gradients are means of two equal ones, so exact; sums over the batch are the same operations."""
    model = network(0)
    optimizer, run = attach(model, name)
    losses = steps(model, optimizer, data())
    encoded = run.finalize()
    for found in (rank["same rows"][name] for rank in ranks):
        assert found["losses"] == pytest.approx(losses, rel=1e-6)
        assert list(found["codes"]) == list(encoded) == ["0.weight", "3.weight", "6.weight"]
        for key, value in encoded.items():
            assert torch.equal(found["codes"][key], value.codes)
            torch.testing.assert_close(found["scales"][key], value.scales, rtol=1e-6, atol=0)
            assert torch.equal(found["weights"][key], value._replace(scales=found["scales"][key]).decode())


@pytest.mark.parametrize("name", methods())
def test_two_ranks_resume_from_a_whole_state(ranks, name):
    for found in (rank["same rows"][name] for rank in ranks):
        assert found["resumed"] == found["losses"][STOP:]
        assert all(torch.equal(found["codes"][key], found["resumed codes"][key]) for key in found["codes"])


def test_looking_between_steps_sees_the_shards_weights(ranks):
    """All of the model is the root here, whose weights FSDP2 leaves whole after a pass without gradients, stale from then on."""
    alone = looked(network(0))
    assert not torch.equal(alone["latent 0"], alone["deployed 0"])
    for found in (rank["looked"] for rank in ranks):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_shard_draws_what_the_whole_parameter_draws_there():
    whole = randomness.uniform(randomness.stream(1, 2, "a"), (6, 8))
    assert torch.equal(randomness.uniform(randomness.stream(1, 2, "a"), (2, 8), offset=32), whole[4:])
    assert not torch.equal(randomness.uniform(randomness.stream(1, 2, "b"), (6, 8)), whole)
    assert not torch.equal(randomness.uniform(randomness.stream(1, 3, "a"), (6, 8)), whole)


def test_draws_are_uniform():
    """Kolmogorov-Smirnov over 2**16 draws: the largest gap exceeds 1.95 / sqrt(n) once in a thousand."""
    draws = randomness.uniform(randomness.stream(0, 0, "w"), (2**16,), dtype=torch.float64).sort().values
    assert (draws - torch.arange(2**16) / 2**16).abs().max() < 1.95 / 2**8
    assert ((draws >= 0) & (draws < 1)).all()
