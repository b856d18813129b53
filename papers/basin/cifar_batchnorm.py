"""Figure: a network with BatchNorm on CIFAR-10. At which bits does RTN fail, what do GPTQ and QAT recover, does the ratio predict it?

Two networks, three schemes. Final numbers re-estimate BatchNorm statistics for the rounded weights on 1,000 training images; the ratios and
the dashed line use those of the float network. Errors are standard errors of the mean paired difference over validation images.
Writes results/cifar_batchnorm.svg, cifar_batchnorm.csv (per configuration) and cifar_batchnorm_summary.csv. Skipped where results/runs.csv
has no such network (its data lie outside the repository).
"""

import matplotlib.pyplot as plt
import numpy as np
from evidence import SCHEMES, TOLERANCE, Row, failed, numbers, of_group, removed, runs
from shared import BLUE, BROWN, GREY, RED, save, write

BITS = (8, 4, 3, 2)
COLUMNS = ("rtn_frozen", "rtn", "rtn_se", "rtn_heldout", "gptq", "gptq_se", "gptq_heldout", "qat", "qat_se", "qat_heldout", "control")
RATIOS = ("rho_uniform", "rho_fn", "quadratic")


def main() -> None:
    rows = of_group(runs(), "cifar-bn")
    if not rows:
        print("skipped: no network on CIFAR-10 in results/runs.csv; set STEPWELL_DATA and run runs.py")
        return
    header = ("network", "scheme", "bits", *COLUMNS, *RATIOS)
    write(
        "cifar_batchnorm.csv",
        header,
        [(row["network"], row["scheme"], row["bits"], *(row[n] for n in (*COLUMNS, *RATIOS))) for row in rows],
    )
    write("cifar_batchnorm_summary.csv", ("bits", "configurations", *SUMMARY), [(b, *summary(rows, b)) for b in BITS])
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.7))
    for axis, scheme in zip(axes, SCHEMES, strict=False):
        draw(axis, [row for row in rows if row["scheme"] == scheme])
        axis.set_title(scheme)
    axes[0].set_ylabel("increase, nat")
    axes[0].legend(frameon=False, fontsize=8)
    for ratio, colour in zip(RATIOS, (BLUE, BROWN, GREY), strict=True):
        scale = TOLERANCE if ratio == "quadratic" else 1.0
        label = "quadratic proxy / tolerance" if ratio == "quadratic" else ratio
        place = [row[ratio] / scale for row in rows]
        axes[3].plot(place, [max(row["rtn"], 1e-3) for row in rows], "o", color=colour, markersize=3, label=label)
        axes[3].plot(place, [max(row["rtn_frozen"], 1e-3) for row in rows], "o", color=colour, markersize=3, fillstyle="none")
    axes[3].axhline(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
    axes[3].axvline(1, color=GREY, linewidth=0.7, linestyle=":")
    axes[3].set(xscale="log", yscale="log", xlabel="ratio", ylabel="RTN increase, nat (empty: frozen)")
    axes[3].legend(frameon=False, fontsize=7)
    save(figure, "cifar_batchnorm.svg")
    described = [row for row in numbers("networks.csv") if row["architecture"] == "cifar-bn"]
    for row in described:
        print(f"{row['network']}: {row['weights']:g} weights, test accuracy {row['test_accuracy']:.3f}")


SUMMARY = (
    *("rtn_fails", "rtn_fails_frozen", "gptq_fails", "qat_fails", "control_fails", "gptq_removed_median", "qat_removed_median"),
    *("right_rho_uniform", "right_rho_fn", "right_quadratic", "right_frozen_rho_uniform", "right_frozen_rho_fn", "right_frozen_quadratic"),
)


def summary(rows: list[Row], bits: int) -> tuple[object, ...]:
    """Return how many configurations fail per method, what is recovered, and how many a ratio calls right."""
    mine = [row for row in rows if row["bits"] == bits]
    bad = failed(mine)
    fails = [len(failed(mine, name)) for name in ("rtn", "rtn_frozen", "gptq", "qat", "control")]
    shares = [float(np.median(removed(bad, name))) if bad else None for name in ("gptq", "qat")]
    right = [
        sum((row[ratio] > (TOLERANCE if ratio == "quadratic" else 1)) == (row[name] > TOLERANCE) for row in mine)
        for name in ("rtn", "rtn_frozen")
        for ratio in RATIOS
    ]
    print(f"{bits} bits, {len(mine)} configurations: fail RTN {fails[0]} (frozen {fails[1]}), GPTQ {fails[2]}, QAT {fails[3]}", end="; ")
    print(f"right calls {dict(zip(RATIOS, right, strict=False))}")
    return len(mine), *fails, *shares, *right


def draw(axis: plt.Axes, rows: list[Row]) -> None:
    for k, name in enumerate(sorted({row["network"] for row in rows})):
        mine = sorted((row for row in rows if row["network"] == name), key=lambda row: BITS.index(row["bits"]))
        places = np.array([BITS.index(row["bits"]) for row in mine]) + 0.1 * k
        for method, label, colour in (("rtn", "RTN", GREY), ("gptq", "GPTQ", RED), ("qat", "QAT", BLUE)):
            look = {"color": colour, "marker": "o^"[k], "markersize": 3, "linewidth": 1, "label": label if k == 0 else None}
            axis.errorbar(places, [row[method] for row in mine], [row[f"{method}_se"] for row in mine], **look)
        axis.plot(places, [row["rtn_frozen"] for row in mine], "--", color=GREY, linewidth=0.7)
    axis.axhline(TOLERANCE, color=GREY, linewidth=0.7, linestyle=":")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set(xticks=range(len(BITS)), xticklabels=BITS, xlabel="bits")


if __name__ == "__main__":
    main()
