"""One of two ranks that train the small language model: `torchrun -m tests.train.sharded_worker FOLDER`; rank 0 writes what they found.

FOLDER holds `data` and `alone`, the run of one process, when this starts. Vocabulary 301 makes the embedding's shards uneven.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.language import SMALL, session_of, tiny, tokens_in

from stepwell.train.pretrain import pretrain
from stepwell.train.ranks import here, together, whole
from stepwell.train.session import advance

NAMES = ("int4_1m_both", "int4_1m", "fp4_1m_lotion")  # STE + LOTION; learned scales; scales of scales, which span shards
STEPS = 20
UNEVEN = SMALL._replace(vocabulary=301)
LAST = "step-000000008"


def recipe(name="int4_1m", **changes):
    """The tests' recipe: 6 rows a step, so 3 for each rank, in micro-batches of 2 and 1."""
    return tiny(name, architecture=UNEVEN, micro=2, save_every=4, **changes)


def weights(session):
    """Return the latent weights, whole."""

    def held():
        return {name: whole(parameter.detach()).clone().contiguous() for name, parameter in session.model.named_parameters()}

    if session.run is None:
        return held()
    with session.run.latent():
        return held()


def trained(name, tokens, *, replicate=False):
    """Take 20 steps in float64; return the losses and the latent weights."""
    ranks = here("cpu", replicate=replicate)
    session = session_of(recipe(name, steps=STEPS), tokens, dtype=torch.float64, ranks=ranks)
    losses = [advance(session, step)["loss"] for step in range(STEPS)]
    found = weights(session)
    if session.run is not None:
        session.run.detach()
    return {"losses": torch.tensor(losses, dtype=torch.float64), **found}


def run(folder, out, **options):
    """Train the recipe to its end into a folder."""
    session = pretrain(recipe(), folder / out, data=str(folder / "data"), **options)
    found = weights(session)
    session.run.detach()
    return found


def begun(source, target):
    """Copy a run as it was after four of its eight steps."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / LAST)


def refused():
    """Return what a world size is told that does not divide the rows."""
    try:
        pretrain(replace(recipe(), rows=7), Path("nowhere"))
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with together():
        ranks, found = here("cpu"), {}
        print(f"rank {ranks.rank}: {refused()}", flush=True)
        tokens = tokens_in(folder / f"tokens{ranks.rank}")
        for name in NAMES:
            found[f"shards {name}"] = trained(name, tokens)
        found["copies int4_1m"] = trained("int4_1m", tokens, replicate=True)
        found["run"] = run(folder, "two")
        if ranks.first:
            begun(folder / "two", folder / "again")
            begun(folder / "two", folder / "fewer")
            begun(folder / "alone", folder / "more")
            begun(folder / "two", folder / "copies")
        ranks.wait()
        found["again"] = run(folder, "again", resume=True)
        found["more"] = run(folder, "more", resume=True)
        found["copies"] = run(folder, "copies", resume=True, replicate=True)
        if ranks.first:
            flat = {f"{case}/{key}": value for case, values in found.items() for key, value in values.items()}
            save_file(flat, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
