"""Figure: rounding that sees a quadratic leaves a basin that it cannot see, unless curvature points at the wall.

Left: four exact cases in the plane (normal (1, 1) / sqrt 2, wall slope 1; H is seen by GPTQ and by exhaustive search, the loss has none).
Middle: share of random points that stay in the basin in 8 dimensions, against the curvature lambda of H = I + (lambda - 1) nu nu^T.
Right: RTN in 64 dimensions against half-width over sqrt(k / 12). Writes results/toy_ptq.svg, toy_ptq_cases.csv, toy_ptq_population.csv
and toy_ptq_rtn.csv.
"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.stats import chi
from shared import BLUE, BROWN, GREEN, GREY, RED, Array, mean, save, share, unit_normals, write

from stepwell.theory import Valley

DIAGONAL = np.ones(2) / np.sqrt(2)
CASES = {"A": ((0.42, 0.36), 0.0), "A-tie": ((0.40, 0.40), 0.0), "B aligned": ((0.42, 0.36), 0.5), "C misaligned": ((0.30, 0.60), -0.5)}
LAMBDAS = (0.1, 0.5, 1.0, 2.0, 10.0, 100.0)
DIM, HALF_WIDTH, DRAWS = 8, 0.25, 2000
WIDTHS, NORMALS, WIDE_DIM, WIDE_DRAWS = np.linspace(0.1, 2.5, 25), (1, 2, 4, 8), 64, 4000


def main() -> None:
    rng = np.random.default_rng(606)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    table = [case(name, np.array(w), off) for name, (w, off) in CASES.items()]
    write("toy_ptq_cases.csv", ("case", "n_rtn", "loss_rtn", "rtn", "gptq", "loss_gptq", "cvp", "loss_cvp", "inside_near_rtn", "T"), table)
    draw_case(axes[0])
    population(axes[1], rng)
    failure_regime(axes[2], rng)
    save(figure, "toy_ptq.svg")
    for row in table:
        print(*row)


def case(name: str, w: Array, off: float) -> tuple[object, ...]:
    valley, hessian = Valley([DIAGONAL], w, 0.3), np.array([[1, off], [off, 1]])
    rtn, gptq, cvp = valley.rtn(w), valley.gptq(w, hessian), valley.cvp(w, hessian, reach=2)
    losses = [float(valley.loss(point)) for point in (rtn, gptq, cvp)]
    entry = valley.ste(w, lr=0.05, steps=400).first_entry
    near = " ".join(spell(point) for point in valley.near(w))
    n = float(valley.distance(rtn)[0])
    return name, n, losses[0], spell(rtn), spell(gptq), losses[1], spell(cvp), losses[2], near, "never" if entry is None else entry


def spell(point: Array) -> str:
    return f"({point[0]:g} {point[1]:g})"


def draw_case(axis: Axes) -> None:
    """Show case A: the basin, the lattice, and the way of STE."""
    w = np.array(CASES["A"][0])
    run = Valley([DIAGONAL], w, 0.3).ste(w, lr=0.05, steps=12)
    along = np.array([-3.0, 3.0])
    edges = [w[1] + w[0] + side * 0.3 * np.sqrt(2) - along for side in (-1, 1)]
    axis.fill_between(along, *edges, color=GREEN, alpha=0.15, linewidth=0)
    axis.plot(along, w.sum() - along, color=GREEN, linewidth=1)
    grid = np.stack(np.meshgrid([-1, 0, 1, 2], [-1, 0, 1, 2]), axis=-1).reshape(-1, 2)
    axis.plot(*grid.T, ".", color=GREY, markersize=5)
    axis.plot(*run.latent.T, "-", color=BLUE, linewidth=1)
    axis.plot(*w, "o", color=BLUE, markersize=4, label="w on the river, and its way")
    axis.plot(0, 0, "x", color=RED, label="RTN = GPTQ = exhaustive search")
    axis.plot(*run.points[-1], "s", color=GREEN, label=f"STE, in the basin at step {run.first_entry}")
    axis.set(xlim=(-0.7, 1.5), ylim=(-0.7, 1.5), title="case A, H = I", aspect="equal")
    axis.legend(frameon=False, fontsize=7, loc="lower left")


def population(axis: Axes, rng: np.random.Generator) -> None:
    draws = []
    for _ in range(DRAWS):
        normal, w = unit_normals(rng, 1, DIM), rng.uniform(-0.5, 0.5, DIM)
        draws.append((Valley(normal, w, HALF_WIDTH), w, normal))
    rtn = np.array([valley.inside(valley.rtn(w)) for valley, w, _ in draws])
    corners = np.array([len(valley.corners(w)) > 0 for valley, w, _ in draws])
    rows, found = [], {"GPTQ": [], "exhaustive": []}  # type: ignore[var-annotated]
    for weight in LAMBDAS:
        gptq, cvp = np.array([rounded(*draw, weight) for draw in draws]).T
        rows.append((weight, *share(gptq), *share(cvp), *mean(gptq - 1.0 * rtn), *mean(cvp - 1.0 * rtn), *share(rtn), *share(corners)))
        found["GPTQ"].append(share(gptq))
        found["exhaustive"].append(share(cvp))
        print(
            f"lambda {weight:g}: GPTQ {gptq.mean():.3f}, exhaustive {cvp.mean():.3f}, RTN {rtn.mean():.3f}, a corner {corners.mean():.3f}"
        )
    names = ("gptq", "cvp_corners", "gptq_minus_rtn", "cvp_minus_rtn", "rtn", "corner_exists")
    write("toy_ptq_population.csv", ("lambda", *(column for name in names for column in (name, f"{name}_se"))), rows)
    for (name, points), colour in zip(found.items(), (BLUE, BROWN), strict=True):
        axis.errorbar(LAMBDAS, *np.array(points).T, color=colour, marker="o", markersize=3, label=name)
    axis.axhline(rtn.mean(), color=GREY, linewidth=1, label="RTN")
    axis.set(xscale="log", xlabel="curvature across the wall over curvature along it", ylabel="share in the basin", ylim=(0, 1.03))
    axis.set_title("d = 8, r = 0.25")
    axis.legend(frameon=False, fontsize=8)


def rounded(valley: Valley, w: Array, normal: Array, weight: float) -> tuple[bool, bool]:
    """Return whether GPTQ and the best floor/ceil corner lie in the basin."""
    hessian = np.eye(DIM) + (weight - 1) * normal.T @ normal
    floor = np.floor(w)
    bits = np.arange(2**DIM)[:, None] >> np.arange(DIM) & 1
    delta = floor + bits - w
    best = floor + bits[np.einsum("pi,ij,pj->p", delta, hessian, delta, optimize=True).argmin()]
    return bool(valley.inside(valley.gptq(w, hessian))), bool(valley.inside(best))


def failure_regime(axis: Axes, rng: np.random.Generator) -> None:
    """RTN's normal error has RMS sqrt(k / 12); with many coordinates its length follows a chi law of k degrees of freedom."""
    rows = []
    for k, colour in zip(NORMALS, (BLUE, BROWN, GREEN, RED), strict=True):
        base = Valley(np.eye(WIDE_DIM)[:k], np.zeros(WIDE_DIM), 1.0)
        distances = np.empty(WIDE_DRAWS)
        for i in range(WIDE_DRAWS):
            w = rng.uniform(-0.5, 0.5, WIDE_DIM)
            valley = replace(base, normals=unit_normals(rng, k, WIDE_DIM), center=w)
            distances[i] = np.linalg.norm(valley.distance(valley.rtn(w)))
        radii = WIDTHS * np.sqrt(k / 12)
        mine = [share(distances <= radius) for radius in radii]
        law = chi.cdf(WIDTHS * np.sqrt(k), k)
        rms = float(np.sqrt((distances**2).mean()))
        rows += [(k, radius, ratio, *p, q, rms) for radius, ratio, p, q in zip(radii, WIDTHS, mine, law, strict=True)]
        axis.plot(WIDTHS, law, color=colour, linewidth=1)
        axis.plot(WIDTHS, [p for p, _ in mine], ".", color=colour, label=f"codimension {k}")
        at_rms = np.mean(distances <= np.sqrt(k / 12))
        print(f"codimension {k}: RMS {rms:.4f}, predicted {np.sqrt(k / 12):.4f}; in the basin at r = sqrt(k / 12): {at_rms:.3f}")
    write("toy_ptq_rtn.csv", ("k", "half_width", "over_sqrt_k_12", "rtn_inside", "rtn_inside_se", "chi_law", "rms"), rows)
    axis.set(xlabel="half-width / sqrt(k / 12)", ylabel="share of RTN in the basin", title="d = 64 (lines: chi law)", ylim=(0, 1.03))
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
