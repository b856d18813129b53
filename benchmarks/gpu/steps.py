"""What does a training step cost at 150 million weights, in bf16, compiled? Time over plain and peak memory, then one table.

    python benchmarks/gpu/steps.py [--toy] [--out benchmarks/results/gpu_steps.json]

`benchmarks/lm_step.py` at 16 sequences of 1024 tokens, 30 rounds: about five minutes on an H100 as estimated from the arithmetic, most of
them compiling. `--toy` runs it with 1.3 million weights, on any machine.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import lm_step

FULL = ["--size", "150m", "--rows", "16", "--length", "1024", "--rounds", "30"]
TOY = ["--size", "1m", "--rows", "2", "--length", "32", "--rounds", "3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu_steps.json")
    options = parser.parse_args()
    lm_step.main([*(TOY if options.toy else FULL), "--out", str(options.out)])


if __name__ == "__main__":
    main()
