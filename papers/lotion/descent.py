"""Table: where LOTION does not win. Plain gradient descent from zero, 6000 steps, learning rates up to 1.9.

The curvature of the diagonal testbed (d = 12000) falls over four decades, so the flat tail is far from its target when training stops.
There the penalty's force inside a cell is of the size of the task's, and holds weights at the grid points they start from. INT4, one
scale per tensor; at each of three targets the best of the rates {1, 1.5, 1.9} under rounding to nearest, for everyone. Writes
results/descent.csv; a minute of one core.
"""

from collections.abc import Callable

import torch
from shared import interval, write
from torch import Tensor
from training import slope

import stepwell as sw
from stepwell.methods.lotion import penalty_gradient

STEPS, RATES, SHIFTS = 6000, (1.0, 1.5, 1.9), (0.13, 0.47, 0.89)


def methods(bed: sw.Testbed, q: sw.Quantizer) -> dict[str, Callable[[Tensor], Tensor]]:
    h = bed.hessian_diagonal
    return {
        "PTQ": lambda w: slope(bed, w),
        "STE": lambda w: slope(bed, q(w)),
        "LOTION, scale detached": lambda w: slope(bed, w) + penalty_gradient(w, h, q, through_scale=False),
        "LOTION-SG": lambda w: slope(bed, w) + penalty_gradient(w, h, q),
    }


def descended(bed: sw.Testbed, q: sw.Quantizer, force: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return the losses to nearest and at random at the best rate."""
    tried = []
    for rate in RATES:
        weight = torch.zeros(bed.dim, dtype=torch.float64)
        for _ in range(STEPS):
            weight = weight.sub_(force(weight), alpha=rate)
        tried.append((bed.loss(q(weight)).item(), bed.smoothed(weight, q).item()))
    return min(tried)


def main() -> None:
    torch.set_num_threads(1)
    rows, q = [], sw.intn(4, block=None)
    found: dict[str, list[tuple[float, float]]] = {}
    for shift in (0.0, *SHIFTS):
        bed = sw.Testbed(shift=shift)
        for name, force in methods(bed, q).items():
            found.setdefault(name, []).append(descended(bed, q, force))
            print(f"shift {shift} {name:<24} {found[name][-1][0]:.4f} / {found[name][-1][1]:.4f}", flush=True)
    for name, losses in found.items():
        (rtn, rtn_half), (rr, rr_half) = (interval(pair[k] for pair in losses[1:]) for k in (0, 1))
        behind, behind_half = interval(mine[0] - ptq[0] for mine, ptq in zip(losses[1:], found["PTQ"][1:], strict=True))
        row = {"method": name, "rtn_shift_0": losses[0][0], "rr_shift_0": losses[0][1], "targets": len(SHIFTS)}
        row |= {"rtn": rtn, "rtn_interval": rtn_half, "rr": rr, "rr_interval": rr_half}
        rows.append(row | {"rtn_over_ptq": behind, "rtn_over_ptq_interval": behind_half})
        print(f"{name:<24} {rtn:.4f} ± {rtn_half:.4f} / {rr:.4f} ± {rr_half:.4f}, over PTQ {behind:+.4f} ± {behind_half:.4f}")
    write("descent.csv", rows)


if __name__ == "__main__":
    main()
