"""Writes from outside: what others do to parameters between two steps is adopted by value, or refused by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.run.managed import SCALE, Managed
from stepwell.run.step import Stepper


def adopt(managed: Sequence[Managed], stepper: Stepper, *, by_value: bool) -> tuple[list[str], int]:
    """Make values that somebody else wrote into parameters their latent weights.

    A write through `parameter.data` leaves no trace but the value: `by_value` compares that too, at the price of a rounding.

    Where a scale spans shards the ranks agree on it again: at every look by value, and else where somebody has written, on all ranks.

    Returns:
        The names of the parameters, and how many written weights do not lie on the grid that they deploy to.
    """
    changed, rounded = [], 0
    spanning = [one for one in managed if one.groups]
    asked = by_value or not all(one.untouched for one in spanning)
    for one in managed:
        if one.latent is None and not one.untouched:
            one.follow()
            one.note()
        if one.latent is None or (one.untouched and not by_value):
            continue
        expected, written = stepper.expected(one), one.weight
        moved = one.follow()
        if not same(expected, written):
            written = written.clone()
            take_over(one, stepper, expected)
            changed.append(one.name)
            rounded += int(((one.weight != written) & (written != expected)).sum())
        elif moved:
            stepper.show(one)
        else:
            one.note()
    if asked:
        stepper.agree(spanning)
        for one in spanning:
            one.note()
    return changed, rounded


@torch.inference_mode(False)
@torch.no_grad()
def take_over(one: Managed, stepper: Stepper, expected: Tensor | None = None) -> None:
    """Make a parameter's value its latent weight, and show what that deploys to.

    With `expected`, what the parameter would hold had nobody written to it, an element that was left alone keeps its latent weight: a
    clamp of a few weights is no reason to round the others. Where no weight of a block kept its value, the whole block is new.
    """
    weight = one.weight
    if expected is None or one.latent is None:
        one.latent = weight.clone(memory_format=torch.preserve_format)
    else:
        same = weight == expected
        kept = one.blocks(same & (weight != 0)).any(1, keepdim=True).expand_as(one.blocks(weight))
        blocks = torch.where(one.blocks(same) & kept, one.blocks(one.latent), one.blocks(weight))
        one.latent = one.unblock(blocks).clone(memory_format=torch.contiguous_format)
        if SCALE in one.tensors and not bool(kept.any()):  # not one block is the old one: these are other weights
            stepper.prepare(one)
    if not torch.equal(one.rounded().to(weight), weight):  # weights that lie on the scales held for them keep these scales
        one.refit(one.source)
    stepper.show(one)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN included."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def refuse_orphans(managed: Sequence[Managed]) -> None:
    """Refuse parameters that the model has replaced: the run would train what nobody uses."""
    for one in managed:
        if one.orphaned:
            raise RuntimeError(
                f"{one.name!r} is another parameter now than when the run began (load_state_dict with assign=True, a replaced layer, "
                "`fully_shard` or accelerate's `prepare`): the run trains one that the model no longer holds. Load without `assign`, or "
                "attach after replacing."
            )


def refuse_thawed(frozen: Sequence[Managed]) -> None:
    """Refuse parameters that began to train after `attach`: no optimizer of the run steps their latent weights."""
    for one in frozen:
        if one.parameter.requires_grad and one.parameter.grad is not None:
            raise RuntimeError(
                f"{one.name!r} was frozen and in no optimizer when the run began, and has a gradient now. "
                "End the run with `detach()`, add it to the optimizer, and attach again."
            )
