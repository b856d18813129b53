"""Figure: the strength of the penalty, which the paper does not ablate; byte language model, 3 and 2 bits, LOTION and STE + LOTION.

Strength 1 is theory's unit, N = 1024 loss terms per step. .25 N to 10 N at one rate per method (LOTION 3.2e-3, STE + LOTION 1.5e-3), two
seeds, test data; nothing is chosen by it. "auto" lets `run.calibrate` measure N before the first step and again every 50. In nats per byte
above full precision with the same data, paired by seed, with 95 % intervals. Writes results/strength_runs.csv (resumable), strength.csv and
strength.svg. Eight minutes of one core.
"""

import argparse
import warnings

import matplotlib.pyplot as plt
import torch
from lab import TERMS, Lab, control, ended, trained
from shared import BLUE, BROWN, Runs, interval, save, write

import stepwell as sw
from stepwell.train.transformer import byte_loss

STRENGTHS = ("1", "0.25", "2", "4", "10", "auto")  # in the order in which they are run
RATES = {"lotion": 3.2e-3, "ste + lotion": 1.5e-3}
BITS, BLOCK, EVERY, BATCHES, BATCH_SEED = (3, 2), 64, 50, 8, 7000
SEEDS = (1, 2)
KEY = ("method", "bits", "strength", "seed")


def calibrated(lab: Lab, run: sw.Run) -> None:
    """Let the run measure its loss terms on batches that are not trained on."""
    batches = lab.batches(BATCHES, BATCH_SEED)
    run.calibrate(byte_loss, batches, every=EVERY)


def made(lab: Lab, runs: Runs, method: str, bits: int, strength: str, seed: int) -> None:
    if runs.has(method, bits, strength, seed):
        return
    q, auto = sw.intn(bits, block=BLOCK), strength == "auto"
    forward = "nearest" if method == "ste + lotion" else "latent"
    chosen = sw.lotion(q, strength=1.0 if auto else float(strength), loss_terms=None if auto else TERMS, forward=forward)
    prepare = (lambda _, run: calibrated(lab, run)) if auto else None
    with warnings.catch_warnings(record=True) as said:  # the largest strengths exceed the stability bound, which is the point here
        warnings.simplefilter("always")
        model, run = trained(lab, chosen, RATES[method], seed, prepare)
    beyond = any("stability bound" in str(one.message) for one in said)
    found = ended(lab, model, run, "test")
    runs.add(dict(zip(KEY, (method, bits, strength, seed), strict=True)) | found | {"warned": str(beyond)})
    print(method, bits, strength, seed, found, flush=True)


def table(runs: Runs) -> list[dict[str, object]]:
    """Return a row per method, width and strength that has runs beside those at strength 1."""
    rows: list[dict[str, object]] = []
    for method in RATES:
        for bits in BITS:
            one = losses(runs, method, bits, "1")
            for strength in STRENGTHS:
                mine = losses(runs, method, bits, strength)
                seeds = sorted(mine.keys() & one.keys())
                if not seeds:
                    continue
                row: dict[str, object] = {"method": method, "bits": bits, "strength": strength, "seeds": len(seeds)}
                for key in ("rtn", "rr"):
                    row[key], row[f"{key}_interval"] = interval(mine[seed][key] - control()[seed] for seed in seeds)
                    row[f"{key}_over_1"], row[f"{key}_over_1_interval"] = interval(mine[seed][key] - one[seed][key] for seed in seeds)
                row["warned"] = runs.where(method=method, bits=bits, strength=strength)[0]["warned"]
                rows.append(row)
    return rows


def losses(runs: Runs, method: str, bits: int, strength: str) -> dict[int, dict[str, float]]:
    """Return a method's losses by seed, to nearest and at random."""
    found = runs.where(method=method, bits=bits, strength=strength)
    return {int(run["seed"]): {key: float(run[key]) for key in ("rtn", "rr")} for run in found}


def draw(rows: list[dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, 2 * len(BITS), figsize=(12, 3.4))
    for axis, (method, bits) in zip(axes, ((method, bits) for bits in BITS for method in RATES), strict=True):
        mine = [row for row in rows if (row["method"], row["bits"]) == (method, bits)]
        mine.sort(key=lambda row: (row["strength"] == "auto", 0.0 if row["strength"] == "auto" else float(str(row["strength"]))))
        for key, colour, label in (("rtn", BLUE, "to nearest"), ("rr", BROWN, "at random")):
            values, half = ([float(row[name]) for row in mine] for name in (key, f"{key}_interval"))  # type: ignore[arg-type]
            axis.errorbar(range(len(mine)), values, yerr=half, marker="o", markersize=3, linewidth=1, color=colour, label=label)
        axis.set(title=f"{method}, {bits} bits", xlabel="strength / N", yscale="log")
        axis.set_xticks(range(len(mine)), [str(row["strength"]) for row in mine], fontsize=8)
    axes[0].set_ylabel("nats per byte above full precision")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, "strength.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="run nothing, summarise what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, lab = Runs("strength_runs.csv", KEY), Lab()
    if not control():
        print("skipped: `python benchmarks/estimators.py --only 'full precision'` comes first")
        return
    for seed in () if options.tables else SEEDS:
        for bits in BITS:
            for strength in STRENGTHS:
                for method in RATES:
                    made(lab, runs, method, bits, strength, seed)
    rows = table(runs)
    if not rows:
        return
    write("strength.csv", rows)
    draw(rows)
    for row in rows:
        print(
            f"{row['method']:<13} INT{row['bits']} strength {row['strength']:<5} {row['rtn']:.4f} ± {row['rtn_interval']:.4f} / "
            f"{row['rr']:.4f} ± {row['rr_interval']:.4f}   over 1: {row['rtn_over_1']:+.4f} ± {row['rtn_over_1_interval']:.4f}"
            f"   ({row['seeds']} seeds)"
        )


if __name__ == "__main__":
    main()
