"""`stepwell train --compile` on two ranks (gloo, on the CPU), in shards and in copies, from the command line: one process's weights."""

import pytest

pytest.importorskip("transformers")
from tests.language import text_folder
from tests.torchrun import on_two_ranks
from tests.train.sharded_worker import furthest, recipe, weights

from stepwell.train.pretrain import pretrain

MINE = "tests.train.sharded_worker:recipe"


def resumed(folder, **changes):
    """Return the latent weights that a folder's last checkpoint holds, or, where there is none, trained to the end, on this process."""
    session = pretrain(recipe(**changes), folder, data=str(folder.parent / "data"), resume=True)
    found = weights(session)
    session.run.detach()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    text_folder(folder / "data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("spread", [[], ["--replicate"]], ids=["shards", "copies"])
def test_compiled_on_two_ranks_ends_where_one_process_ends(place, spread):
    """Micro-batches of 2 and 1 row, so of two shapes; Adam may turn the rounding errors of fused sums into a share of a step of 3e-3."""
    folder = place / f"two{len(spread)}"
    printed = on_two_ranks("stepwell", "train", MINE, "--data", place / "data", "--out", folder, "--compile", *spread)
    assert "rounded to nearest (RTN)" in printed
    assert furthest(resumed(folder, compile=True), resumed(place / f"one{len(spread)}")) < 1e-4
