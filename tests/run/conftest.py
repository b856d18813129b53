"""Two FSDP2 ranks (gloo, on the CPU), started once for all tests that read what they found."""

import pytest
import torch
from tests.torchrun import on_two_ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What each rank of `sharded_worker` wrote, under "same rows" and "own rows"."""
    folder = tmp_path_factory.mktemp("sharded")
    on_two_ranks("tests.run.sharded_worker", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
