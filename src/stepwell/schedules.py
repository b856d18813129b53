"""Schedules: numbers that change with the optimizer steps done, as functions `step -> value`.

Every schedule here holds its first value before `begin` and its last from `begin + steps` on. Source of the sigmoid: Jin et al., "PARQ"
(arXiv:2503.15748), section 5; here it reaches both ends exactly wherever its centre lies (theirs only where that is the middle).
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Return a schedule that is `value` at every step."""
    _check_values(value)
    return lambda step: value


def linear(start: float, end: float, *, steps: int, begin: int = 0) -> Schedule:
    """Return a straight line from `start` to `end`.

    Args:
        start, end: values, finite and 0 or more.
        steps: from the one to the other.
        begin: optimizer steps that are done when it sets off.

    Raises:
        ValueError: a value that is negative or not finite; fewer than one step; a negative begin.

    >>> [linear(1, 0, steps=4)(step) for step in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    _check_values(start, end)
    done = _share(steps, begin)
    return lambda step: start * (1 - done(step)) + end * done(step)


def cosine(start: float, end: float, *, steps: int, begin: int = 0) -> Schedule:
    """Return half a cosine wave from `start` to `end`: flat at both ends. Arguments as in `linear`."""
    _check_values(start, end)
    done = _share(steps, begin)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * done(step))) / 2


def exponential(start: float, end: float, *, steps: int, begin: int = 0) -> Schedule:
    """Return a curve from `start` to `end` that changes by the same factor in every step; both must be positive. Else as `linear`.

    >>> exponential(1e-4, 1, steps=4)(1)
    0.001
    """
    _check_values(start, end)
    if not (start > 0 and end > 0):
        raise ValueError(f"`start` and `end` of an exponential schedule must be positive: got {start!r} and {end!r}. Use `linear`.")
    done = _share(steps, begin)
    return lambda step: float(start ** (1 - done(step)) * end ** done(step))


def sigmoid(start: float, end: float, *, steps: int, begin: int = 0, steepness: float = 10.0, center: float = 0.5) -> Schedule:
    """Return an S-shaped curve from `start` to `end`, PARQ's way from 1 to 0.

    Args:
        start, end, steps, begin: as in `linear`.
        steepness: positive; nearly a line below 1.
        center: share of the steps at which the middle is reached, between 0 and 1.

    Raises:
        ValueError: as in `linear`; a steepness or a centre out of its range.
    """
    _check_values(start, end)
    if not (math.isfinite(steepness) and 0 < steepness <= 500):
        raise ValueError(f"`steepness` must be a positive number up to 500: got {steepness!r}. PARQ uses 10.")
    if not (math.isfinite(center) and 0 <= center <= 1):
        raise ValueError(f"`center` must be a share of the steps between 0 and 1: got {center!r}.")
    done = _share(steps, begin)

    def height(share: float) -> float:
        return 1 / (1 + math.exp(steepness * (share - center)))

    high, low = height(0.0), height(1.0)
    return lambda step: end + (start - end) * (height(done(step)) - low) / (high - low)


def scheduled(name: str, value: float | Schedule) -> Schedule:
    """Return an argument that may be a number or a schedule as a schedule; `name` is the argument's, for messages.

    Raises:
        TypeError: neither the one nor the other.
        ValueError: a number, or a schedule's value before the first step, that is negative or not finite.
    """
    if isinstance(value, bool) or not (isinstance(value, int | float) or callable(value)):
        raise TypeError(f"`{name}` must be a number or a function of the step such as `linear(0, 1, steps=1000)`: got {value!r}.")
    if callable(value):
        value_at(name, value, 0)
        return value
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number, 0 or more: got {value!r}.")
    return constant(value)


def value_at(name: str, schedule: Schedule, step: int) -> float:
    """Return a schedule's value.

    Raises:
        ValueError: it is negative or not finite.
    """
    value = float(schedule(step))
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be finite and 0 or more at every step: its schedule gave {value!r} at step {step}.")
    return value


def _share(steps: int, begin: int) -> Schedule:
    """Return how much of the way is done, 0 to 1."""
    for name, value, least in (("steps", steps, 1), ("begin", begin, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` of a schedule must be a whole number, {least} or more: got {value!r}.")
    return lambda step: min(max((step - begin) / steps, 0.0), 1.0)


def _check_values(*values: float) -> None:
    """Refuse what no schedule may take."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"a schedule's values must be finite numbers, 0 or more: got {value!r}.")
