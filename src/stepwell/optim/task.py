"""Task: what one parameter's step does besides AdamW, and the numbers that a kernel needs for it.

Both kernels (kernel.c, kernel_numba.py) read `Numbers` as float32 in the order of its fields. Double precision is rounded once, here, at
the places where torch's fused AdamW rounds it; the penalty's numbers likewise where the passes around an optimizer round theirs.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepwell.formats import Format

EPSILON = 2.0**-23  # of float32


class Task(NamedTuple):
    """What a method asks of the next step of one parameter.

    Attributes:
        format: the grid of element values, symmetric or full integers.
        block: elements per scale, consecutive in memory.
        latent: the weight to train, of the parameter's shape; the parameter then receives it rounded. None trains the parameter itself.
        scales: `(blocks, 1)` scales that are held; None fits them by the largest weight of each block, before the step and after it.
        loss_terms, strength: of LOTION's penalty; without both there is none.
        through_scale: whether the penalty's derivative goes through fitted scales.
        reach: how many root mean square gradients the penalty may push a weight with.
    """

    format: Format
    block: int
    latent: Tensor | None = None
    scales: Tensor | None = None
    loss_terms: float = 0.0
    strength: float = 0.0
    through_scale: bool = False
    reach: float = 0.0


class Numbers(NamedTuple):
    """The constants of one step, in the order in which the kernels read them.

    Attributes:
        sign: -1 where the objective is maximized.
        decay: 1 - lr * weight_decay.
        mix, blend: first moment = mix * (grad - first) + base, where the base is the gradient if `blend` and else the moment, as in lerp.
        gain, keep: second moment = gain * grad * grad + keep * second.
        root, eps, rate: weight += rate * first / (sqrt(second) / root + eps); the rate is negative.
        pull: of the penalty, by which scale times second moment is multiplied; 0 where there is none.
        factor: what the penalty's gradient is multiplied by on its way into the first moment.
        spread, least: the penalty's gradient is at most sqrt(second * spread) + least.
        through: 1 where the scale is differentiated.
        low, high, edge: ends of the grid, and the value that the largest weight sits on.
        border, tolerance: units beyond which a weight sits on the edge, and closer than which it sits on a grid point.
        full: 1 where the scale takes the sign of the largest weight.
    """

    sign: float
    decay: float
    mix: float
    blend: float
    gain: float
    keep: float
    root: float
    eps: float
    rate: float
    pull: float
    factor: float
    spread: float
    least: float
    through: float
    low: float
    high: float
    edge: float
    border: float
    tolerance: float
    full: float


NUMBERS = np.dtype([(name, np.float32) for name in Numbers._fields])


def numbers_of(group: Mapping[str, Any], step: float, task: Task) -> NDArray[np.void]:
    """Return `Numbers` as an array of one record.

    Args:
        group: the optimizer's parameter group.
        step: of the parameter, this one included.
        task: what is asked for.
    """
    lr, (one, two), eps = float(group["lr"]), map(float, group["betas"]), float(group["eps"])
    weight, format = np.float32(1 - one), task.format
    small = weight < np.float32(0.5)
    before = 1 / (1 - two ** (step - 1)) if step > 1 else 0.0  # bias correction of the second moment that the penalty sees
    numbers = Numbers(
        sign=-1.0 if group["maximize"] else 1.0,
        decay=1 - lr * float(group["weight_decay"]),
        mix=float(weight if small else weight - np.float32(1)),
        blend=0.0 if small else 1.0,
        gain=1 - two,
        keep=two,
        root=math.sqrt(1 - two**step),
        eps=eps,
        rate=-(lr / (1 - one**step)),
        pull=task.loss_terms * before * task.strength / 2,
        factor=(1 - one) / one if task.loss_terms * task.strength else 0.0,
        spread=task.reach**2 * before,
        least=task.reach * eps,
        through=float(task.through_scale and task.scales is None),
        low=format.low,
        high=format.high,
        edge=format.edge,
        border=format.edge * (1 - 8 * EPSILON),
        tolerance=4 * EPSILON * max(-format.low, format.high),
        full=float(format.levels == "full"),
    )
    return np.array([tuple(numbers)], NUMBERS)


class Cache:
    """The numbers of one step, computed once for all parameters that share them."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        """Keep the optimizer's parameter group."""
        self._group = group
        self._found: dict[tuple[Any, ...], NDArray[np.void]] = {}

    def of(self, step: float, task: Task) -> NDArray[np.void]:
        """Return `numbers_of` this group, step and task."""
        key = (step, id(task.format), task.scales is None, *task[4:])
        if key not in self._found:
            self._found[key] = numbers_of(self._group, step, task)
        return self._found[key]
