"""What does llama.cpp compute with a GGUF file of ours? Every block type and architecture, with the cause of what differs.

    python benchmarks/ship_llama_cpp.py [--out benchmarks/results/ship_llama_cpp.json]      # needs the extra `runtimes`

Small models of random weights (as in ship_matrix.py), rounded to the block type's grid. "error" is the largest difference of llama.cpp's
logits from those of the model with its grid weights in PyTorch, relative to the largest logit; "kernels" the largest difference of any
product from what its kernel is known to give for the inputs that it got (8-bit activations), relative to its own largest output; "decoded"
the first number with the file's weights decoded by `gguf` and products in float32: no rounding of activations, nothing else changed.
One thread, keys and values in float32.
"""

import argparse
import copy
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from common import processor
from ship_matrix import SUBJECTS, divides

import stepwell as sw
from stepwell.export import llama_cpp

ROOT = Path(__file__).parents[1]
KINDS = ("q4_0", "q4_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
ARCHITECTURES = ("Llama", "Qwen 3", "OLMo 2")


def main() -> None:
    """Run all cells and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ship_llama_cpp.json")
    options = parser.parse_args()
    if not llama_cpp.available():
        print("llama-cpp-python is not installed: pip install 'stepwell[runtimes]'")
        return
    torch.set_num_threads(1)
    rows = []
    for name in ARCHITECTURES:
        subject = SUBJECTS[name]()
        for kind in KINDS:
            grid = sw.target(f"gguf:{kind}")
            kept = [row.name for row in sw.select(subject.model).chosen if not divides(row.parameter, grid)]
            encoded = sw.ptq.rtn(copy.deepcopy(subject.model), grid, skip=kept)
            with tempfile.TemporaryDirectory() as folder:
                ternary = "tq1_0" if kind == "tq1_0" else "tq2_0"
                path = sw.export.gguf(subject.model, encoded, Path(folder) / "m.gguf", ternary=ternary).path
                found = sw.verify(path, subject.model, subject.example, encoded)
            row = {
                "architecture": name,
                "type": kind,
                "codes": found.codes_equal,
                "scales": found.scales_equal,
                "error": found.max_relative_error,
                "kernels": max(layer.modelled or 0.0 for layer in found.layers),
                "decoded": found.remainder,
                "kl": found.kl,
                "top1": found.top1_agreement,
                "passed": found.passed,
            }
            rows.append(row)
            print("  ".join(f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)
    told = {"processor": processor(), "torch": torch.__version__, "llama-cpp-python": version("llama-cpp-python")}
    options.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
