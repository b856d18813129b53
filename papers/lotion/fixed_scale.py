"""Table: at a fixed scale the smoothed loss of a separable quadratic is convex and piecewise linear, and its minimum is the optimum.

d = 2000, INT4, the scale of w*; from zero, 400 steps along the gradient over the curvature, step length .5 falling linearly to zero.
Theory: LOTION ends at the optimum and on the grid; plain training, once converged, does too under rounding to nearest; constant-step
straight-through training swings around thresholds, and costs about what randomized rounding of w* costs, twice the optimum. Ratios to the
optimum at that scale over ten targets, mean and 95 % interval. Writes results/fixed_scale.csv; seconds.
"""

from collections.abc import Callable

import torch
from shared import interval, write
from torch import Tensor

import stepwell as sw
from stepwell.methods.lotion import penalty_gradient

DIM, STEPS, LENGTH, SHIFTS = 2000, 400, 0.5, tuple(k / 10 + 0.03 for k in range(10))
Force = Callable[[Tensor], Tensor]


def trained(force: Force) -> Tensor:
    """Return weights after 400 steps; `force` is the gradient over the curvature."""
    weight = torch.zeros(DIM, dtype=torch.float64)
    for step in range(STEPS):
        weight = weight - LENGTH * (1 - step / STEPS) * force(weight)
    return weight


def methods(bed: sw.Testbed, q: sw.Quantizer) -> dict[str, Force]:
    draws, ones = torch.Generator().manual_seed(0), torch.ones(DIM, dtype=torch.float64)
    return {
        "PTQ": lambda w: w - bed.target,
        "STE": lambda w: q(w) - bed.target,
        "RAT": lambda w: q(w, rounding=sw.stochastic(draws)) - bed.target,
        "LOTION": lambda w: w - bed.target + penalty_gradient(w, ones, q),
    }


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {}
    for shift in (0.0, *SHIFTS):
        bed = sw.Testbed(dim=DIM, exponent=1.1, shift=shift)
        q = sw.intn(4, block=None, scale=bed.target.abs().max().item() / 7)
        best = bed.loss(bed.rtn(q)).item()
        for name, force in methods(bed, q).items():
            weight = trained(force)
            found.setdefault(name, []).append((bed.loss(q(weight)).item() / best, bed.smoothed(weight, q).item() / best))
    rows = []
    for name, ratios in found.items():
        (rtn, rtn_half), (rr, rr_half) = (interval(pair[k] for pair in ratios[1:]) for k in (0, 1))
        row = {"method": name, "rtn_shift_0": ratios[0][0], "rr_shift_0": ratios[0][1], "targets": len(SHIFTS)}
        rows.append(row | {"rtn": rtn, "rtn_interval": rtn_half, "rr": rr, "rr_interval": rr_half})
        print(
            f"{name:<8} RTN {rtn:.5f} ± {rtn_half:.5f}   RR {rr:.4f} ± {rr_half:.4f}   (shift 0: {ratios[0][0]:.5f} / {ratios[0][1]:.4f})"
        )
    write("fixed_scale.csv", rows)


if __name__ == "__main__":
    main()
