"""Rows are done once each, by as many threads as torch uses and no more than they are worth, and errors come through."""

import threading

import pytest
import torch

from stepwell.threads import spread


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "most", "cut"), [(0, 4, 1), (1, 4, 1), (2, 9, 1), (10, 2, 1), (1000, 9, 128), (256, 9, 128), (7, 0, 1)])
def test_every_row_is_done_once(threads, rows, most, cut):
    done, names = [], set()

    def work(start, stop):
        done.append((start, stop))
        names.add(threading.current_thread().name)

    spread(work, rows, most=most, cut=cut)
    assert sorted(row for start, stop in done for row in range(start, stop)) == list(range(rows))
    assert len(done) <= max(1, min(threads, most))
    assert all(start % cut == 0 for start, _ in done)
    assert threading.current_thread().name in names


def test_an_error_in_any_part_comes_through(threads):
    def work(start, stop):
        if stop == 30:
            raise OSError("part lost")

    with pytest.raises(OSError, match="part lost"):
        spread(work, 30, most=9)
