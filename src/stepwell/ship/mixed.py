"""Mixed: bits of its own for every layer, after `bits_per_layer`, on the grids that one target holds beside each other."""

from collections.abc import Sequence
from dataclasses import replace

from stepwell.advice.bits import AFTER_TRAINING, bits_per_layer
from stepwell.quantizers import Quantizer
from stepwell.ship.choice import CALIBRATING
from stepwell.ship.plan import Plan
from stepwell.ship.rounding import Progress
from stepwell.ship.source import Source


def mixed(
    source: Source,
    base: Plan,
    grids: Sequence[Quantizer],
    *,
    tolerance: float,
    budget: float | None,
    skip: Sequence[str],
    progress: Progress,
) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan with a grid per layer, and why it is that one.

    Args:
        source: the model; grids are found on its learning batches, so that the measuring ones are new to them.
        base: the weights that are quantized.
        grids: what the target holds.
        tolerance: increase of the loss that is acceptable where there is no budget.
        budget: mean bits per weight, scales included; None asks for the fewest within the tolerance.
        skip: what the user leaves out.
        progress: told every measurement.
    """
    done = 0

    def tell(words: str) -> None:
        nonlocal done
        done += 1
        progress(f"bits per layer: {words}", done, done + 1)

    found = bits_per_layer(
        source.model, source.loss, source.learning[:CALIBRATING], grids=grids, tolerance=None if budget is not None else tolerance,
        bits_per_weight=budget, skip=[*skip, *base.floats], on_step=tell,
    )  # fmt: skip
    asked = f"the fewest bits within {tolerance:g}" if budget is None else f"the lowest loss with {budget:g} bits"
    why = [
        f"{asked}, on the {len(source.learning[:CALIBRATING])} batches it was found on: {found.bits:.3g} bits, loss {found.measured:+.3g}"
    ]
    if not found.within:
        why.append("which is more than was asked for: the finest grid of this target misses it too")
    if found.uniform is not None:
        why.append(f"one grid for all, {found.uniform}, takes {found.uniform_bits:.3g} bits at {found.uniform_measured:+.3g}")
    chosen = {name: replace(found.quantizers[name], axis=grid.axis) for name, grid in base.grids.items()}
    return replace(base, grids=chosen), (*why, AFTER_TRAINING.rstrip("."))
