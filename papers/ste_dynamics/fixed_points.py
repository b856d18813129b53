"""Figure: where training ends, and how far that is from the unquantized model.

Left: deviation against bits at range 3, with the high-resolution formula (lr 0.5, noise 0.5) and the low-noise formula (lr 0.01, no
noise, averaged over 40 ranges from 2 to 3, because it depends on where the target falls between two levels). Right: error against the
learning rate (3 bits, range 2, noise 0.3): the unquantized model diverges at 2, quantized weights stay confined. Writes
results/fixed_points.svg,
results/fixed_points_bits.csv and results/fixed_points_lr.csv.
"""

import matplotlib.pyplot as plt
import numpy as np
from shared import BLUE, BROWN, GREEN, GREY, save, write

from stepwell.theory import Problem, Staircase, high_resolution, low_noise, stationary

BITS = range(2, 11)
RATES = np.geomspace(0.05, 4.0, 25)
RANGES = np.linspace(2.0, 3.0, 40)


def main() -> None:
    bits = [deviation(b) for b in BITS]
    header = ("bits", "exact", "closure", "high_resolution", "quiet_exact", "quiet_closure", "low_noise")
    write("fixed_points_bits.csv", header, bits)
    rates = [at_rate(float(lr)) for lr in RATES]
    write("fixed_points_lr.csv", ("lr", "exact", "closure", "unquantized"), rates)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    b = np.array(bits, float)
    axes[0].plot(b[:, 0], b[:, 3], color=GREY, linestyle="--", label="high-resolution formula")
    axes[0].plot(b[:, 0], b[:, 6], color=GREY, linestyle=":", label="low-noise formula")
    axes[0].plot(b[:, 0], b[:, 2], color=BROWN, marker="s", linestyle="none", label="closure, lr 0.5, noise 0.5")
    axes[0].plot(b[:, 0], b[:, 1], color=BLUE, marker="o", markersize=4, linestyle="none", label="exact, lr 0.5, noise 0.5")
    axes[0].plot(b[:, 0], b[:, 4], color=GREEN, marker="^", markersize=4, linestyle="none", label="exact, lr 0.01, no noise")
    axes[0].set(yscale="log", xlabel="bits per weight", ylabel="final error above the unquantized model")
    r = np.array(rates, float)
    axes[1].plot(r[:, 0], r[:, 3], color=GREY, linestyle="--", label="unquantized")
    axes[1].plot(r[:, 0], r[:, 2], color=BROWN, label="Gaussian closure")
    axes[1].plot(r[:, 0], r[:, 1], color=BLUE, label="exact limit")
    axes[1].axvline(2.0, color=GREY, linewidth=0.6)
    axes[1].set(xlabel="learning rate", ylabel="final error", ylim=(0, 1.0))
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save(figure, "fixed_points.svg")
    noisy = np.array(bits, float)
    print("exact deviation over the high-resolution formula:", *(f"{row[1] / row[3]:.3f}" for row in noisy))
    print("quiet deviation over the low-noise formula:", *(f"{row[4] / row[6]:.3f}" for row in noisy))


def deviation(bits: int) -> tuple[float, ...]:
    noisy = Problem(Staircase(bits, 3.0), lr=0.5, label_noise=0.5)
    plain = stationary(Problem(None, lr=0.5, label_noise=0.5)).error
    quiet = [Problem(Staircase(bits, float(omega)), lr=0.01) for omega in RANGES]
    return (
        bits,
        *(stationary(noisy, limit=limit).error - plain for limit in ("exact", "closure")),
        high_resolution(noisy) - plain,
        *(float(np.mean([stationary(p, limit=limit).error for p in quiet])) for limit in ("exact", "closure")),
        float(np.mean([low_noise(p) for p in quiet])),
    )


def at_rate(lr: float) -> tuple[float, ...]:
    grid = Staircase(3, 2.0)
    quantized = Problem(grid, lr=lr, label_noise=0.3)
    float_end = stationary(Problem(None, lr=lr, label_noise=0.3)).error
    return lr, stationary(quantized).error, stationary(quantized, limit="closure").error, float_end


if __name__ == "__main__":
    main()
