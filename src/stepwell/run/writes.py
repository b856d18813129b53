"""Writes from outside: what others do to parameters between two steps is adopted by value, or refused by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.run.managed import Managed
from stepwell.run.step import Stepper


def adopt(managed: Sequence[Managed], stepper: Stepper, *, by_value: bool) -> tuple[list[str], int]:
    """Make values that somebody else wrote into parameters their latent weights.

    A write through `parameter.data` leaves no trace but the value: `by_value` compares that too, at the price of a rounding.

    Returns:
        The names of the parameters, and how many written weights do not lie on the grid that they deploy to.
    """
    changed, rounded = [], 0
    for one in managed:
        if one.latent is None or (one.untouched and not by_value):
            continue
        expected, written = stepper.expected(one), one.weight
        moved = one.follow()
        if not same(expected, written):
            written = written.clone()
            stepper.adopt(one, expected)
            changed.append(one.name)
            rounded += int(((one.weight != written) & (written != expected)).sum())
        elif moved:
            stepper.show(one)
        else:
            one.note()
    return changed, rounded


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN included."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def refuse_orphans(managed: Sequence[Managed]) -> None:
    """Refuse parameters that the model has replaced: the run would train what nobody uses."""
    for one in managed:
        if one.orphaned:
            raise RuntimeError(
                f"{one.name!r} is another parameter now than when the run began (load_state_dict with assign=True, a replaced layer): "
                "the run trains one that the model no longer holds. Load without `assign`, or attach after replacing."
            )


def refuse_thawed(frozen: Sequence[Managed]) -> None:
    """Refuse parameters that began to train after `attach`: no optimizer of the run steps their latent weights."""
    for one in frozen:
        if one.parameter.requires_grad and one.parameter.grad is not None:
            raise RuntimeError(
                f"{one.name!r} was frozen and in no optimizer when the run began, and has a gradient now. "
                "End the run with `detach()`, add it to the optimizer, and attach again."
            )
