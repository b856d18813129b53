"""Figure: theorem R1, the latent point comes closer to the river until the basin is entered; steps taken against its bound.

12 dimensions, 3 normals, half-width 2.2 (wider than the largest rounding error E), starts 2.2 to 3.5 away from the river that RTN leaves
outside. Plain is the linear wall; the other rows vary the wall, the curvature, the shape of the basin and the learning rate. R1 says
nothing about starts on the river: there r > E means that RTN is inside already, which the last column of the table checks.
Writes results/toy_distance.svg, toy_distance.csv (per setting) and toy_distance_runs.csv (per run).
"""

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREEN, GREY, RED, Array, mean, save, share, unit_normals, write

from stepwell.theory import Valley

DIM, NORMALS, HALF_WIDTH, DRAWS = 12, 3, 2.2, 100
SETTINGS: dict[str, tuple[float, dict[str, object]]] = {
    "plain, lr 0.02": (0.02, {}),
    "plain, lr 0.1": (0.1, {}),
    "curvature 0.05": (0.02, {"curvature": 0.05}),
    "anisotropic basin": (0.02, {"anisotropy": (0.95, 1.0, 0.97)}),
    "saturating wall": (0.02, {"wall": "saturating", "saturation": 20.0}),
}


def main() -> None:
    rng = np.random.default_rng(3301)
    rows, runs = [], []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for (name, (lr, options)), colour in zip(SETTINGS.items(), (BLUE, BROWN, GREEN, GREY, RED), strict=True):
        mine = [one(rng, lr, options) for _ in range(DRAWS)]
        entry, bound, closer = np.array([row[:3] for row in mine]).T
        on_river = [starts_inside(rng, options) for _ in range(DRAWS)]
        ratio = entry / bound
        rows.append((name, DRAWS, int((entry > bound).sum()), *mean(ratio), ratio.max(), *share(closer == 1), float(np.mean(on_river))))
        runs += [(name, *row) for row in mine]
        axes[0].plot(bound, entry, ".", color=colour, markersize=4, label=name)
        print(f"{name}: {rows[-1][2]} of {DRAWS} beyond the bound, mean T / bound {rows[-1][3]:.3f}, largest {rows[-1][5]:.3f}")
    write(
        "toy_distance.csv",
        (
            "setting",
            "runs",
            "violations",
            "T_over_bound",
            "T_over_bound_se",
            "largest",
            "always_closer",
            "always_closer_se",
            "rtn_inside_from_river",
        ),
        rows,
    )
    write("toy_distance_runs.csv", ("setting", "T", "bound", "always_closer", "distance_at_start", "distance_at_entry"), runs)
    ends = np.array([1.0, max(row[2] for row in runs)])
    axes[0].plot(ends, ends, color=GREY, linewidth=1)
    axes[0].set(xscale="log", yscale="log", xlabel="bound of R1", ylabel="first entry", title="d = 12, k = 3, r = 2.2")
    axes[0].legend(frameon=False, fontsize=7)
    one_way(axes[1], rng)
    save(figure, "toy_distance.svg")


def one(rng: np.random.Generator, lr: float, options: dict[str, object]) -> tuple[int, int, bool, float, float]:
    """Draw until R1 says something about a start outside; return entry, bound, whether every step came closer, and both distances."""
    while True:
        normals, center = unit_normals(rng, NORMALS, DIM), rng.uniform(-0.5, 0.5, DIM)
        valley = Valley(normals, center, HALF_WIDTH, **options)  # type: ignore[arg-type]
        w = center + normals.T @ unit_normals(rng, 1, NORMALS)[0] * rng.uniform(HALF_WIDTH, 3.5)
        bound = valley.ste(w, lr=lr, steps=0).bounds.distance
        if bound:
            run = valley.ste(w, lr=lr, steps=bound + 1)
            entry = run.first_entry
            if entry is None:
                entry = bound + 1
            distance = np.linalg.norm(valley.distance(run.latent[: entry + 1]), axis=1)
            return entry, bound, bool((np.diff(distance) < 0).all()), float(distance[0]), float(distance[-1])


def starts_inside(rng: np.random.Generator, options: dict[str, object]) -> bool:
    """Return whether RTN of a random point of the river lies in the basin."""
    w = rng.uniform(-0.5, 0.5, DIM)
    valley = Valley(unit_normals(rng, NORMALS, DIM), w, HALF_WIDTH, **options)  # type: ignore[arg-type]
    return bool(valley.inside(valley.rtn(w)))


def one_way(axis: plt.Axes, rng: np.random.Generator) -> None:
    """Show latent and deployed distance along one run."""
    normals, center = unit_normals(rng, NORMALS, DIM), rng.uniform(-0.5, 0.5, DIM)
    valley = Valley(normals, center, HALF_WIDTH)
    run = valley.ste(center + 3.4 * normals[0], lr=0.02, steps=80)
    size: dict[str, Array] = {
        name: np.linalg.norm(valley.distance(p), axis=1) for name, p in (("deployed", run.points), ("latent", run.latent))
    }
    for (name, values), colour in zip(size.items(), (BROWN, BLUE), strict=True):
        axis.plot(values, color=colour, label=name)
    axis.axhline(HALF_WIDTH, color=GREY, linewidth=1)
    axis.set(xlabel="step", ylabel="distance to the river", title="one run, lr 0.02 (grey: half-width)")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
