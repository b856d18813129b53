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

from stepwell.train.blame import culprit
from stepwell.train.evaluation import evaluate
from stepwell.train.pretrain import pretrain
from stepwell.train.ranks import here, together, whole
from stepwell.train.session import advance
from stepwell.train.tokens import batch

NAMES = ("int4_1m_both", "int4_1m", "fp4_1m_lotion")  # STE + LOTION; learned scales; scales of scales, which span shards
LOOKS = ("fp_1m", "int4_1m_lotion")
STEPS = 20
UNEVEN = SMALL._replace(vocabulary=301)
LAST = "step-000000008"


def recipe(name="int4_1m", **changes):
    """The tests' recipe: 6 rows a step, so 3 for each rank, in micro-batches of 2 and 1."""
    return tiny(name, **{"architecture": UNEVEN, "micro": 2, "save_every": 4, **changes})


def weights(session):
    """Return the latent weights, whole."""

    def held():
        return {name: whole(parameter.detach()).clone().contiguous() for name, parameter in session.model.named_parameters()}

    if session.run is None:
        return held()
    with session.run.latent():
        return held()


def furthest(one, two):
    """Return the largest difference between two runs' weights."""
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def trained(name, tokens, *, replicate=False):
    """Take 20 steps in float64; return the losses and the latent weights."""
    ranks = here("cpu", replicate=replicate)
    session = session_of(recipe(name, steps=STEPS), tokens, dtype=torch.float64, ranks=ranks)
    losses = [advance(session, step)["loss"] for step in range(STEPS)]
    found = weights(session)
    if session.run is not None:
        session.run.detach()
    return {"losses": torch.tensor(losses, dtype=torch.float64), **found}


def looked(name, tokens):
    """Look at a model whose head is on the grid too after each of two steps; return the losses, and the latent weights at the end."""
    head = {"architecture": UNEVEN._replace(tied=False), "skip": ()}
    session = session_of(recipe(name, **head), tokens, dtype=torch.float64, ranks=here("cpu"))
    losses = []
    for step in range(2):
        advance(session, step)
        losses += evaluate(session.model, session.run, session.recipe, tokens.held, session.ranks, draws=2)
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


def blamed(tokens):
    """Return where a gradient that is infinite in one weight of one rank's shard, in FSDP2's root, is said to be."""
    session = session_of(recipe(), tokens, ranks=here("cpu"))
    advance(session, 0)
    model, ranks = session.model, session.ranks
    if not ranks.first:
        model.get_parameter("model.embed_tokens.weight").grad.to_local()[0, 0] = torch.inf
    rows = batch(tokens.train, ranks.rows(6), step=0, size=6, length=16, seed=0)
    session.run.detach()
    return culprit(model, [rows], session.recipe, ranks)


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
        print(f"rank {ranks.rank}: {blamed(tokens)}", flush=True)
        for name in NAMES:
            found[f"shards {name}"] = trained(name, tokens)
        for name in LOOKS:
            found[f"looks {name}"] = looked(name, tokens)
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
