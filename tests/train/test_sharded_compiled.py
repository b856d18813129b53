"""`stepwell train --compile` on two ranks (gloo, on the CPU), in shards and in copies, from the command line: one process's weights."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from tests.language import text_folder
from tests.train.sharded_worker import furthest, recipe, weights

from stepwell.train.pretrain import pretrain

ROOT = Path(__file__).parents[2]
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "stepwell", "train", MINE]
    options = ["--data", str(place / "data"), "--out", str(folder), "--compile", *spread]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "rounded to nearest (RTN)" in done.stdout
    assert furthest(resumed(folder, compile=True), resumed(place / f"one{len(spread)}")) < 1e-4
