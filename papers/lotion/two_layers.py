"""Figure: a two-layer linear network against its width k, with the exact expectation under randomized rounding of both layers.

L = 1/2 sum h (V^T u / k - w*)^2, d = 400, h_i = i^-1.1, INT4 with one scale per layer, Adam (.9, .999), 1000 steps, cosine to zero,
strength 1. Start: u_j = 1 + n_j / 2, V = n / 10 with n standard normal; a seed draws the start and shifts the target. The rate, of {.003,
.01, .03}, is chosen per method and width on seed 0 by the loss to nearest; reported are three other seeds. Variants of the penalty 1/2 sum
g sigma^2 with the Gauss-Newton diagonal g: g and scale frozen; "product rule": g differentiated too; "scale": the scale differentiated
too; "exact": with the term of both layers' rounding together, which makes L + penalty the mean loss itself. Writes
results/two_layers_runs.csv (resumable), two_layers.csv and two_layers.svg. Three minutes of one core.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from shared import BLUE, BROWN, GREEN, GREY, PURPLE, RED, Runs, interval, save, write
from torch import Tensor

import stepwell as sw
from stepwell.methods.lotion import penalty_gradient
from stepwell.testbed import TwoLayer

STEPS, RATES, SEEDS, WIDTHS = 1000, (0.003, 0.01, 0.03), (1, 2, 3), (1, 4, 16)
Q = sw.intn(4, block=None)
KEY = ("width", "method", "seed", "rate")


class Point(NamedTuple):
    """Weights of both layers, u `(k,)` and V `(k, 400)`; or anything with one entry for each, such as a gradient."""

    outer: Tensor
    inner: Tensor


Force = Callable[[TwoLayer, Point], Point]


def task(net: TwoLayer, point: Point) -> Point:
    """Return the gradient of the loss."""
    error = net.spectrum * (point.outer @ point.inner / net.width - net.target) / net.width
    return Point(point.inner @ error, point.outer[:, None] * error)


def rounded(point: Point, draws: torch.Generator | None = None) -> Point:
    return Point(*(Q(part, rounding=None if draws is None else sw.stochastic(draws)) for part in point))


def variances(point: Point) -> Point:
    return Point(*(sw.variance(Q.bracket(part)) for part in point))


def penalised(*, product: bool, scale: bool, exact: bool) -> Force:
    """Return the gradient of loss and penalty."""

    def force(net: TwoLayer, point: Point) -> Point:
        factor, noise, found = net.spectrum / net.width**2, variances(point), task(net, point)
        outer, inner = net.gauss_newton(*point)
        if exact:
            outer, inner = outer + noise.inner @ factor, inner + noise.outer[:, None] * factor
        pulls = [penalty_gradient(part, g, Q, through_scale=scale) for part, g in zip(point, (outer, inner), strict=True)]
        if product:  # the derivative of g, which is quadratic in the other layer's weights
            pulls[0] += point.outer * (noise.inner @ factor)
            pulls[1] += point.inner * noise.outer[:, None] * factor
        return Point(*(a + b for a, b in zip(found, pulls, strict=True)))

    return force


def methods() -> dict[str, Force]:
    draws = torch.Generator().manual_seed(0)
    return {
        "PTQ": task,
        "STE": lambda net, point: task(net, rounded(point)),
        "RAT": lambda net, point: task(net, rounded(point, draws)),
        "LOTION, g and scale frozen": penalised(product=False, scale=False, exact=False),
        "LOTION + product rule": penalised(product=True, scale=False, exact=False),
        "LOTION + scale": penalised(product=False, scale=True, exact=False),
        "LOTION + product rule + scale": penalised(product=True, scale=True, exact=False),
        "LOTION, exact, + scale": penalised(product=True, scale=True, exact=True),
    }


def start(width: int, seed: int) -> tuple[TwoLayer, Point]:
    draws = torch.Generator().manual_seed(seed)
    net = TwoLayer(width, shift=0.13 * seed)
    outer, inner = (torch.randn(*size, generator=draws, dtype=torch.float64) for size in ((width,), (width, net.dim)))
    return net, Point(1 + outer / 2, inner / 10)


def trained(width: int, seed: int, rate: float, force: Force) -> tuple[float, float]:
    """Return the losses to nearest and, on average, at random."""
    net, point = start(width, seed)
    held = [torch.nn.Parameter(part) for part in point]
    optimizer = torch.optim.Adam(held, lr=rate, foreach=False)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        found = force(net, Point(*(part.detach() for part in held)))
        for part, gradient in zip(held, found, strict=True):
            part.grad = gradient
        optimizer.step()
    end = Point(*(part.detach() for part in held))
    return net.loss(*rounded(end)).item(), net.smoothed(*end, Q).item()


def fill(runs: Runs) -> None:
    """Make the runs that are not there: first those that choose a rate."""
    for width in WIDTHS:
        for method, force in methods().items():
            for seed in (0, *SEEDS):
                best = None if seed == 0 else chosen(runs, width, method)
                for rate in RATES if best is None else (float(best["rate"]),):
                    if runs.has(width, method, seed, rate):
                        continue
                    rtn, rr = trained(width, seed, rate, force)
                    runs.add(dict(zip(KEY, (width, method, seed, rate), strict=True)) | {"rtn": rtn, "rr": rr})
                    print(f"k = {width:<3} {method:<30} seed {seed} rate {rate:<5} {rtn:.6f} / {rr:.6f}", flush=True)


def chosen(runs: Runs, width: int, method: str) -> dict[str, str]:
    return min(runs.where(width=width, method=method, seed=0), key=lambda row: float(row["rtn"]))


def reported(runs: Runs, width: int, method: str, key: str) -> list[float]:
    """Return a loss per seed, at the chosen rate."""
    rate = float(chosen(runs, width, method)["rate"])
    return [float(row[key]) for seed in SEEDS for row in runs.where(width=width, method=method, seed=seed, rate=rate)]


def table(runs: Runs) -> list[dict[str, object]]:
    """Geometric means, because losses of seeds differ by factors; the interval is of their logarithm, as a factor."""
    rows: list[dict[str, object]] = []
    for width in WIDTHS:
        for method in methods():
            row: dict[str, object] = {"width": width, "method": method, "rate": float(chosen(runs, width, method)["rate"])}
            for key in ("rtn", "rr"):
                mine, ste = reported(runs, width, method, key), reported(runs, width, "STE", key)
                middle, half = interval(math.log(loss) for loss in mine)
                under, under_half = interval(math.log(theirs / loss) for loss, theirs in zip(mine, ste, strict=True))
                row |= {key: math.exp(middle), f"{key}_factor": math.exp(half)}
                row |= {f"{key}_ste_over": math.exp(under), f"{key}_ste_over_low": math.exp(under - under_half)}
                row |= {f"{key}_ste_over_high": math.exp(under + under_half)}
            rows.append(row)
    return rows


def draw(rows: list[dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    colours = (GREY, BROWN, RED, "#7aa6d8", PURPLE, GREEN, BLUE, "black")
    for axis, key, title in zip(axes, ("rtn", "rr"), ("rounded to nearest", "rounded at random"), strict=True):
        for method, colour in zip(methods(), colours, strict=True):
            mine = [row for row in rows if row["method"] == method]
            middle = [float(row[key]) for row in mine]  # type: ignore[arg-type]
            spread = [float(row[f"{key}_factor"]) for row in mine]  # type: ignore[arg-type]
            errors = [[m - m / f for m, f in zip(middle, spread, strict=True)], [m * f - m for m, f in zip(middle, spread, strict=True)]]
            axis.errorbar(WIDTHS, middle, yerr=errors, marker="o", markersize=3, linewidth=1, elinewidth=0.6, color=colour, label=method)
        axis.set(xscale="log", yscale="log", xlabel="hidden units k", title=title)
        axis.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, fontsize=7)
    save(figure, "two_layers.svg")


def main() -> None:
    torch.set_num_threads(1)
    runs = Runs("two_layers_runs.csv", KEY)
    fill(runs)
    rows = table(runs)
    write("two_layers.csv", rows)
    draw(rows)
    for row in rows:
        print(
            f"k = {row['width']:<3} {row['method']:<30} {row['rtn']:.6f} / {row['rr']:.6f}   STE over this "
            f"{row['rtn_ste_over']:.2f} ({row['rtn_ste_over_low']:.2f} to {row['rtn_ste_over_high']:.2f}) / {row['rr_ste_over']:.2f}"
        )


if __name__ == "__main__":
    main()
