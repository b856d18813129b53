"""The records that the solvers return. Each carries a status: a number that cannot be trusted says so."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from stepwell.theory.staircase import Array

Status = Literal["ok", "stiff", "runaway", "diverged", "not converged"]
Mechanism = Literal["dead zone", "in-cell", "saturation", "none"]


@dataclass(frozen=True, eq=False)
class Density:
    """The law of a latent weight given its teacher, in cells.

    Attributes:
        edges: cell boundaries per teacher node, `(nodes, cells + 1)`, weight units.
        p: density averaged over each cell, `(times, nodes, cells)`; its integral and the atoms sum to one.
        teacher: teacher values w*, `(nodes,)`; for a symmetric Gaussian teacher only the positive half.
        teacher_mass: quadrature weights of the nodes, `(nodes,)`, summing to one.
        atoms: mass frozen below and above the clip range, `(times, nodes, 2)`; zero without clipping.
    """

    edges: Array
    p: Array
    teacher: Array
    teacher_mass: Array
    atoms: Array

    def cdf(self, time: int, *, node: int = 0) -> Array:
        """Return the distribution function at the cell edges, `(cells + 1,)`, for the output time with index `time`."""
        inside = np.cumsum(self.p[time, node] * np.diff(self.edges[node]))
        return np.asarray(self.atoms[time, node, 0] + np.concatenate([[0.0], inside]))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A learning curve.

    Attributes:
        t: times, `(times,)`; t = step / dimension.
        error: eps_g at the times, half the noise-free squared error; of the rounded weights where weights are quantized.
        status: "ok"; "runaway" (latent weights leave the grid for good, the error is still right); "stiff" (a layer was not
            resolved); "diverged" (infinite from some time on); "not converged".
        message: one sentence where the status, or something else, needs it.
        error_latent: the error of the latent weights (LOTION, PTQ), else None.
        error_randomized: the mean error of randomly rounded weights (LOTION), else None.
        stderr: standard error of a simulated mean over seeds, else None.
        density: the law of the weights where it was asked for, else None.
    """

    t: Array
    error: Array
    status: Status = "ok"
    message: str = ""
    error_latent: Array | None = None
    error_randomized: Array | None = None
    stderr: Array | None = None
    density: Density | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray) and self.status == "ok" and not np.all(np.isfinite(value)):
                raise ValueError(f"`{field.name}` must be finite in a trajectory with status 'ok': got {value!r}.")


@dataclass(frozen=True)
class Stationary:
    """The state after infinitely many steps.

    Attributes:
        error: eps_g of the rounded weights.
        status: "ok", "runaway" (no stationary law of the latent weight, the error still has this limit), "diverged" or
            "not converged".
        message: one sentence where the status needs it.
        error_latent: the error of the latent weights (LOTION, PTQ), else None.
        error_randomized: the mean error of randomly rounded weights (LOTION), else None.
    """

    error: float
    status: Status = "ok"
    message: str = ""
    error_latent: float | None = None
    error_randomized: float | None = None


@dataclass(frozen=True)
class Plateau:
    """How long a learning curve stays at its start, and how sharply it leaves.

    Attributes:
        l10: first time with a tenth of the whole drop done: the plateau length.
        l90: first time with nine tenths done.
        sharpness: `(l90 - l10) / l10`; below one is sharp.
        drop: the whole drop, from the first error to the smallest.
        flat: the longest later window `(start, end)` in which the error moves by less than 5 % of its range before it moves
            by more than 20 %; None if there is none.
    """

    l10: float
    l90: float
    sharpness: float
    drop: float
    flat: tuple[float, float] | None = None
