"""Ranks: one process without a group; rows of a batch are shared out whole, each once."""

import pytest
import torch

from stepwell.train.ranks import Ranks, here


def test_alone_there_is_one_process_and_sums_are_free():
    ranks, value = here("cpu"), torch.ones(3)
    assert (ranks.rank, ranks.size, ranks.first, ranks.device.type) == (0, 1, True, "cpu")
    assert ranks.total(value) is value
    ranks.wait()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_every_row_belongs_to_exactly_one_process(size):
    rows = [row for rank in range(size) for row in Ranks(rank, size, torch.device("cpu")).rows(12)]
    assert rows == list(range(12))


def test_a_world_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="got 12 rows for 5 processes"):
        Ranks(0, 5, torch.device("cpu")).rows(12)
