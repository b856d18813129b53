"""Table: what a training step costs, which the paper does not say. Read from benchmarks/results/, where the measurements are.

`python benchmarks/step_cost.py` and `python benchmarks/step_cost.py --all` measure again, on a quiet machine. A transformer of 3.2 million
block weights, 1024 tokens a step, AdamW, float32, one thread; ratios of processor time within a round. Writes results/cost.csv.
"""

import json

from shared import ROOT, write

FILES = ("step_cost.json", "step_cost_all.json")


def main() -> None:
    rows: dict[str, dict[str, object]] = {}
    for name in FILES:
        path = ROOT / "benchmarks" / "results" / name
        if not path.exists():
            print(f"skipped: {path.relative_to(ROOT)} is not there")
            continue
        found = json.loads(path.read_text())
        for variant, row in found["variants"].items():
            entry = {"variant": variant, "over_plain": row["cpu_ratio"], "extra_ms": row["extra_cpu_ms"], "floor_ms": row.get("floor_ms")}
            rows.setdefault(variant, entry | {"memory_over_plain": row.get("memory_ratio"), "rounds": found["rounds"], "file": name})
        print(f"{name}: {found['machine']}")
    if rows:
        write("cost.csv", list(rows.values()))
    for row in rows.values():
        memory = "" if row["memory_over_plain"] is None else f", memory {row['memory_over_plain']:.3f}"
        print(f"{row['variant']:<24} {row['over_plain']:.3f} times the plain step, {row['extra_ms']:.1f} ms more{memory}")


if __name__ == "__main__":
    main()
