"""Rounded: what goes into the quantized layers rounded to 8 bits as well (W8A8, W4A8), for targets whose files can say so.

Static rounding takes one range per layer from the calibration batches, before any weight is touched; dynamic rounding finds a scale for
every token while the model runs. What the certificate holds of it puts the same rounding into a model again.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from stepwell.activation_grids import HIGH, LOW, Range
from stepwell.activations import quantize_activations
from stepwell.ship.choice import CALIBRATING
from stepwell.ship.plan import Plan
from stepwell.ship.records import STATIC, Activations
from stepwell.ship.source import Source, inputs


@contextmanager
def rounded(source: Source, plan: Plan, scheme: str | None) -> Iterator[Activations | None]:
    """Round what goes into the weights of a plan while the block runs, and yield what is done; None without a scheme.

    Args:
        source: the model, and the batches that static ranges are measured on.
        plan: the weights; layers whose weights stay in float keep their inputs.
        scheme: "int8", one range per layer, or "int8-token", one scale per token.

    Raises:
        ValueError: a layer that no batch reaches, or one whose weight is not multiplied with its own input.
    """
    if scheme is None:
        yield None
        return
    skip = tuple(plan.floats)
    seen = source.learning[:CALIBRATING] if scheme == STATIC else []
    handle = quantize_activations(source.model, calibrate=[inputs(source, batch) for batch in seen] or None, skip=skip)
    try:
        ranges = {name: (found.scale, found.zero) for name, found in handle.static.items()}
        yield Activations(scheme, handle.modules, skip, ranges, len(seen))
    finally:
        handle.remove()


@contextmanager
def as_certified(model: nn.Module, held: Mapping[str, Any], named: str) -> Iterator[None]:
    """Round the activations of a model as a certificate says they are rounded in its artifact, while the block runs.

    Args:
        model: the float model.
        held: the certificate.
        named: the certificate's place, for errors.

    Raises:
        ValueError: a description that cannot be read, or that names other layers than the model has.
    """
    told = held.get("activations")
    if told is None:
        yield
        return
    try:
        skip = [str(name) for name in told["skip"]]
        static = {str(name): _range(*pair) for name, pair in told["ranges"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`artifact`: {named} says of rounded activations what cannot be read ({error!r}).") from error
    handle = quantize_activations(model, static=static or None, skip=skip)
    try:
        yield
    finally:
        handle.remove()


def _range(scale: Any, zero: Any) -> Range:
    """Return a static grid, if it is one."""
    if not isinstance(scale, float) or not (0 < scale < math.inf) or not isinstance(zero, int) or not LOW <= zero <= HIGH:
        raise ValueError(f"a range of {scale!r}, {zero!r}")
    return Range(scale, zero)
