"""Table: automatic strength. What `run.calibrate` measures on the byte language model, against the N = 1024 loss terms of a step.

Grids INT8, INT4, INT3, INT2 (blocks of 64) and NVFP4, at the shared base, where training goes on; three sets of eight batches that are not
trained on, eight draws each. The acceptance interval is [.6, 1.5] of N. Writes results/calibration.csv. Half a minute of one core.
"""

import torch
from lab import SEEDS, SKIP, TERMS, Lab
from shared import interval, write

import stepwell as sw
from stepwell.train.transformer import byte_loss

GRIDS = {"INT8": sw.int8(block=64), "INT4": sw.int4(block=64), "INT3": sw.int3(block=64), "INT2": sw.int2(block=64), "NVFP4": sw.nvfp4()}
BATCHES, BATCH_SEEDS, RATE, LOW, HIGH = 8, (7001, 7002, 7003), 3.2e-3, 0.6, 1.5


def main() -> None:
    torch.set_num_threads(1)
    lab, rows = Lab(), []
    for name, q in GRIDS.items():
        student = lab.student(RATE, SEEDS[0])
        run = sw.attach(student.model, sw.lotion(q, loss_terms=TERMS), student.optimizer, skip=SKIP)
        ratios = []
        for seed in BATCH_SEEDS:
            found = run.calibrate(byte_loss, lab.batches(BATCHES, seed))
            ratios.append(found.loss_terms / TERMS)
        middle, half = interval(ratios)
        within = min(ratios) >= LOW and max(ratios) <= HIGH
        rows.append({"grid": name, "ratio": middle, "interval": half, "least": min(ratios), "most": max(ratios), "within": str(within)})
        print(f"{name:<6} N measured / N = {middle:.3f} ± {half:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    write("calibration.csv", rows)


if __name__ == "__main__":
    main()
