"""From trials to a table: the learning rate chosen on validation images, means over seeds, paired differences to RTN."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepwell.train.compare import FLOAT_BITS, Trial


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (zero-spread seeds give zero)."""

    mean: float
    stderr: float

    @property
    def sigmas(self) -> float:
        """The mean in standard errors."""
        if self.stderr == 0:
            return 0.0 if self.mean == 0 else float(np.copysign(np.inf, self.mean))
        return self.mean / self.stderr


class Row(NamedTuple):
    """One method at one width, on test images; losses in nats per image, `gain` = RTN's loss minus this one's, paired by seed."""

    arm: str
    bits: int
    lr: float
    validation_loss: float
    loss: Estimate
    accuracy: Estimate
    randomized_loss: Estimate
    randomized_accuracy: Estimate
    latent_loss: Estimate
    gain: Estimate
    randomized_gain: Estimate


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and standard error of at least two values.

    >>> estimate([1.0, 3.0])
    Estimate(mean=2.0, stderr=1.0)
    """
    if len(values) < 2:
        raise ValueError(f"`values` must hold at least two numbers: got {len(values)}. A spread needs two seeds.")
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5))


def chosen(trials: Sequence[Trial], arm: str, bits: int) -> list[Trial]:
    """Return a method's trials at the learning rate with the lowest mean validation loss, ordered by seed."""
    by_lr: dict[float, list[Trial]] = {}
    for trial in trials:
        if (trial.arm, trial.bits) == (arm, bits):
            by_lr.setdefault(trial.lr, []).append(trial)
    if not by_lr:
        raise ValueError(f"`trials` hold nothing for arm={arm!r} at bits={bits}. Names: {sorted({trial.arm for trial in trials})}.")
    best = min(by_lr.values(), key=_validation_loss)
    return sorted(best, key=lambda trial: trial.seed)


def summarize(trials: Sequence[Trial], *, against: str) -> list[Row]:
    """Return one row per method and width, in the order of the trials.

    Args:
        trials: all of a comparison.
        against: the method whose loss the paired gains are measured from; full precision has no such gain (zero).
    """
    rows = []
    for arm, bits in dict.fromkeys((trial.arm, trial.bits) for trial in trials):
        mine = chosen(trials, arm, bits)
        rival = mine if bits == FLOAT_BITS else chosen(trials, against, bits)
        rows.append(
            Row(
                arm,
                bits,
                mine[0].lr,
                _validation_loss(mine),
                loss=estimate([trial.nearest.loss for trial in mine]),
                accuracy=estimate([trial.nearest.accuracy for trial in mine]),
                randomized_loss=estimate([trial.randomized.loss for trial in mine]),
                randomized_accuracy=estimate([trial.randomized.accuracy for trial in mine]),
                latent_loss=estimate([trial.latent.loss for trial in mine]),
                gain=estimate([other.nearest.loss - trial.nearest.loss for trial, other in zip(mine, rival, strict=True)]),
                randomized_gain=estimate([other.randomized.loss - trial.randomized.loss for trial, other in zip(mine, rival, strict=True)]),
            )
        )
    return rows


def best(rows: Sequence[Row], bits: int, arms: Sequence[str]) -> Row:
    """Return the row of the method with the lowest validation loss at a width, among the named methods."""
    return min((row for row in rows if row.bits == bits and row.arm in arms), key=lambda row: row.validation_loss)


def _validation_loss(trials: Sequence[Trial]) -> float:
    """Mean validation loss over seeds; a diverged run (NaN) counts as infinite."""
    return float(np.mean([np.nan_to_num(trial.validation.loss, nan=np.inf) for trial in trials]))
