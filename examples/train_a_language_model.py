"""A language model trained for four bits from one's own text, stopped half way, resumed, and shipped as a Hugging Face folder.

python examples/train_a_language_model.py

The same from the command line: `stepwell train examples/train_a_language_model.py:recipe --data texts --out run [--resume]`.
Needs the extra `hf`.
"""

from dataclasses import replace
from pathlib import Path

import stepwell as sw
from stepwell.recipes import lm
from stepwell.train.outcome import finish
from stepwell.train.pretrain import Seen, pretrain
from stepwell.train.recipe import Architecture, Recipe


def recipe() -> Recipe:
    """Return a run of our own: STE + LOTION at four bits as in `recipes.lm`, on a model and a budget for a minute of one core."""
    small = Architecture("llama", width=64, layers=2, heads=4, hidden=128, vocabulary=300, tied=True)
    budget = {"steps": 60, "warmup": 6, "rows": 8, "length": 32, "micro": 4, "save_every": 20, "evaluate_every": 20}
    return replace(lm.int4_1m_both(), name="mine", architecture=small, **budget)


def write_texts(folder: Path) -> None:
    """Write a few documents: the answers of a multiplication table."""
    folder.mkdir(exist_ok=True)
    for a in range(2, 32):
        lines = [f"{a} times {b} is {a * b}" for b in range(2, 60)]
        (folder / f"{a}.txt").write_text("\n".join(lines) + "\n")


def stop_half_way(seen: Seen) -> None:
    """Play somebody who presses Ctrl-C."""
    if seen.step == 45:
        raise KeyboardInterrupt


def main() -> None:
    write_texts(Path("texts"))
    try:
        pretrain(recipe(), Path("run"), data="texts", watch=stop_half_way)
    except KeyboardInterrupt:
        print("stopped at step 45; the checkpoints of steps 20 and 40 are in run/checkpoints")

    session = pretrain(recipe(), Path("run"), data="texts", resume=True)
    outcome = finish(session, Path("run"))
    print(f"held-out loss in nats per token: float {outcome.losses.latent:.3f}, on the grid {outcome.losses.nearest:.3f}")

    encoded = sw.load(outcome.files["encoded"])  # codes and scales, as they were trained
    name, weight = next(iter(encoded.items()))
    print(f"{len(encoded)} weights in {outcome.files['model']}, such as {name}: {weight.quantizer}, codes {weight.codes[0, :6].tolist()}")


if __name__ == "__main__":
    main()
