"""What does a quantized training step cost? Plain, ours and torchao's, interleaved in one run.

    python benchmarks/step_cost.py [--rounds 20] [--all] [--out benchmarks/results/step_cost.json]

Model: a Llama-like transformer of 4 layers, width 256, feed-forward 704, vocabulary 4096; batch 8 x 128 tokens, float32, AdamW, one thread;
the 28 block linears (3.2 million weights) are quantized to int4 in blocks of 32. Variants take the automatic path, numba's kernels at this
size; "eager" is what runs where numba is not installed. Every round runs each variant once, in an order that rotates, and a ratio is the
median over rounds of variant / plain *within the round*, so that a drifting machine cancels. `--all` times every method instead, held and
learned scales and the default included, annealed ones in the middle of their way, into step_cost_all.json, against the bar of 1.08.
Memory is measured in a process of its own per variant: growth of the peak resident size over the freshly built model, with the
allocator's mmap threshold fixed so that freed tensors leave the process. The floor of a variant is the least memory traffic that its
extra work can have as passes around an optimizer, at the bandwidth of a copy measured in the same run. Needs
`pip install "stepwell[bench,fast]"`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import processor
from torch import nn

import stepwell as sw
from stepwell.methods.base import Method
from stepwell.schedules import constant
from stepwell.train.quantize import recipe

VARIANTS = ("plain", "ste", "lotion", "ste + lotion", "ste, eager", "lotion, eager", "torchao int4 g32")
BATCH, LENGTH, VOCABULARY = 8, 128, 4096
TERMS = BATCH * LENGTH
EAGER = ", eager"  # as where numba is not installed
BAR = 1.08  # a step on the automatic path over a plain one, at most
# Bytes per managed weight that passes around the optimizer must move, float32. STE: copy the latent in (8), copy the result out (8), write
# the rounded weight while the latent is in cache (4). LOTION: read weight, second moment and first moment, write the first moment.
FLOOR_BYTES = {"ste": 20, "lotion": 16, "ste + lotion": 36, "ste, eager": 20, "lotion, eager": 16}


def every() -> dict[str, Method]:
    """Return every method, in the state in which its steps cost most: annealed ones half way, schedules that do not end."""
    q, forever = sw.int4(block=32), 10_000
    half = constant(0.5)
    return {
        "ste": sw.ste(q),
        "clipped ste": sw.ste(q, clip=0.8),
        "lotion": sw.lotion(q, loss_terms=TERMS),
        "ste + lotion": sw.lotion(q, loss_terms=TERMS, forward="nearest"),
        "coupled": sw.coupled(q, loss_terms=TERMS),
        "coupled, nearest": sw.coupled(q, loss_terms=TERMS, nearest=True),
        "sampled": sw.sampled(q),
        "prox": sw.prox(q, strength=1.0, loss_terms=TERMS),
        "ste + prox": sw.prox(q, strength=1.0, loss_terms=TERMS, forward="nearest"),
        "own curvature": sw.fisher(sw.lotion(q, loss_terms=TERMS)),
        "parq": sw.parq(q, slope=half),
        "binary relax": sw.binary_relax(q, share=half),
        "soft, hot": sw.soft(q, temperature=half),
        "soft, cold": sw.soft(q, temperature=constant(0.02)),
        "cage": sw.cage(q, pull=constant(1.0)),
        "held scales": sw.held(sw.ste(q)),
        "held scales, lotion": sw.held(sw.lotion(q, loss_terms=TERMS, forward="nearest")),
        "lsq": sw.lsq(q),
        "learned scales, parq": sw.learned(sw.parq(q, slope=half)),
        "learned scales, latent": sw.learned(sw.lotion(q, loss_terms=TERMS)),
        "faster": sw.faster(sw.ste(q), 2.0),
        "default": recipe(q, steps=forever, loss_terms=TERMS),
    }


def build() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCABULARY, tie_word_embeddings=False
    )
    return LlamaForCausalLM(config)


def prepare(variant: str) -> tuple[Callable[[], None], int]:
    """Return one training step of a variant, and how many weights it quantizes."""
    model, methods = build(), every()
    if variant == "torchao int4 g32":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
        quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    name, eager = variant.removesuffix(EAGER), variant.endswith(EAGER)
    if name in methods:
        run = sw.attach(model, methods[name], optimizer, skip=["lm_head"], compile=False if eager else None)
        expected = "eager path" if eager else "numba path"
        if expected not in repr(run):
            raise SystemExit(f"{variant} is to be measured on the {expected}, and is on another: {run!r}. Is numba installed?")
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    quantized = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name)
    return step, quantized


def timings(variants: Sequence[str], rounds: int, warmup: int) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Return wall and CPU seconds of every variant in every round."""
    steps, quantized = {}, 0
    for variant in variants:
        steps[variant], quantized = prepare(variant)
    wall: dict[str, list[float]] = {variant: [] for variant in variants}
    cpu: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(warmup + rounds):
        for k in range(len(variants)):
            variant = variants[(turn + k) % len(variants)]
            before, used = time.perf_counter(), time.process_time()
            steps[variant]()
            if turn >= warmup:
                wall[variant].append(time.perf_counter() - before)
                cpu[variant].append(time.process_time() - used)
        print(f"\rround {turn + 1} of {warmup + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return wall, cpu, quantized


def peak_growth(variant: str) -> float:
    """Return MB by which the peak resident size grows over the freshly built model, in a fresh process."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--memory-of", variant]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(variant: str) -> None:
    torch.set_num_threads(1)
    step, _ = prepare(variant)
    base = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    print((_resident("VmHWM") - base) / 1e3)


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1.024


def copy_bandwidth() -> float:
    """Return bytes per second moved by a float32 copy of 20 million elements, beyond any cache: read plus write."""
    source, target = torch.zeros(20_000_000), torch.zeros(20_000_000)
    times = []
    for _ in range(15):
        before = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - before)
    return 2 * 4 * source.numel() / min(times)


def summarise(rounds: int, *, everything: bool) -> dict[str, object]:
    """Return ratios to the plain step; of the usual variants also memory and floors."""
    torch.set_num_threads(1)
    variants = ("plain", *every()) if everything else VARIANTS
    bandwidth = copy_bandwidth()
    wall, cpu, quantized = timings(variants, rounds, warmup=4)
    memory = {} if everything else {variant: peak_growth(variant) for variant in variants}
    rows = {}
    for variant in variants:
        paired = sorted(a / b for a, b in zip(wall[variant], wall["plain"], strict=True))
        paired_cpu = [a / b for a, b in zip(cpu[variant], cpu["plain"], strict=True)]
        extra = statistics.median(a - b for a, b in zip(cpu[variant], cpu["plain"], strict=True))
        rows[variant] = {
            "wall_ms": 1e3 * statistics.median(wall[variant]),
            "wall_ratio": statistics.median(paired),
            "wall_ratio_quartiles": [paired[len(paired) // 4], paired[-1 - len(paired) // 4]],
            "cpu_ratio": statistics.median(paired_cpu),
            "extra_cpu_ms": 1e3 * extra,
        }
        if everything:
            rows[variant] |= {"within_bar": statistics.median(paired_cpu) <= BAR}
            continue
        floor = FLOOR_BYTES.get(variant, 0) * quantized / bandwidth
        rows[variant] |= {"floor_ms": 1e3 * floor, "extra_over_floor": extra / floor if floor else None}
        rows[variant] |= {"memory_mb": memory[variant], "memory_ratio": memory[variant] / memory["plain"]}
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numba": version("numba"),
        "rounds": rounds,
        "quantized_weights": quantized,
        "copy_gb_per_s": bandwidth / 1e9,
        "variants": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--all", action="store_true", help="every method, times only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    result = summarise(options.rounds, everything=options.all)
    out = options.out or Path(__file__).parent / "results" / ("step_cost_all.json" if options.all else "step_cost.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["machine"])
    report(result["variants"])  # type: ignore[arg-type]


def report(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line per variant."""
    print(f"{'variant':<24} {'wall ms':>8} {'wall x':>7} {'cpu x':>7} {'extra ms':>9}")
    for variant, row in rows.items():
        times = f"{variant:<24} {row['wall_ms']:>8.0f} {row['wall_ratio']:>7.3f} {row['cpu_ratio']:>7.3f} {row['extra_cpu_ms']:>9.1f}"
        if "within_bar" in row:
            print(times if row["within_bar"] else f"{times}   above {BAR}")
            continue
        over = f"{row['extra_over_floor']:.1f}" if row["extra_over_floor"] else "-"
        print(
            f"{times}   floor {row['floor_ms']:.1f} ms, {over} times that; {row['memory_mb']:.0f} MB, {row['memory_ratio']:.3f} times plain"
        )


if __name__ == "__main__":
    main()
