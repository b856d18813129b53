"""What does a training step of a language model cost under each method? Tokens per second, time over plain, peak memory, interleaved.

    python benchmarks/lm_step.py [--size 15m] [--rows 4] [--length 256] [--rounds 12] [--out benchmarks/results/lm_step.json]

Sizes are those of `stepwell.recipes.lm`: 1m, 15m, 150m, 300m; the others are rows and tokens of a step. On a GPU the model is compiled and
computes in bf16; on a CPU it is eager float32 on one thread, and times are processor time, so that others on the machine do not count.
Plain is torch's fused AdamW; ours is `sw.optim.AdamW` on a CPU, and on a GPU hooks around torch's fused AdamW. torchao's QAT rounds
weights in every forward pass; its PARQ maps them every ten steps, so that its mean over the rounds says more than its median. A ratio is
the median over rounds of a variant's time over plain's within the round. Memory is measured before that, one variant after the other: on a
CPU the growth of the peak resident size over the built model, in a process of its own, on a GPU the peak of allocated memory, model
included. Needs `pip install "stepwell[bench,hf]"`.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import processor
from common.language import VARIANTS, Setting, flops, interleaved, matmul_speed, prepare, ratio

from stepwell.recipes import lm
from stepwell.train.language import build

WARMUP, MEASURED = 3, 3  # rounds before timing, and steps whose memory is measured


def setting_of(options: argparse.Namespace) -> Setting:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = getattr(lm, f"fp_{options.size}")()
    return Setting(recipe.architecture, options.rows, options.length, device, fast=device.type == "cuda")


def measure_memory(variant: str, setting: Setting) -> float:
    """Return MB at the peak of some steps."""
    if setting.device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(setting.device)
        base = torch.cuda.memory_allocated(setting.device)
        step = prepare(variant, setting).step
        for _ in range(MEASURED):
            step()
        return (torch.cuda.max_memory_allocated(setting.device) - base) / 1e6
    torch.set_num_threads(1)
    step = prepare(variant, setting).step
    gc.collect()
    base = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(MEASURED):
        step()
    return (_resident("VmHWM") - base) / 1e3


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1.024


def memory_of(variant: str, options: argparse.Namespace) -> float:
    """Return the same, on a CPU from a process of its own, with the allocator's mmap threshold fixed so that freed tensors leave it."""
    if torch.cuda.is_available():
        return measure_memory(variant, setting_of(options))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    told = ["--size", options.size, "--rows", str(options.rows), "--length", str(options.length)]
    command = [sys.executable, __file__, *told, "--memory-of", variant]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1])


def table(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, by variant."""
    if setting.device.type == "cpu":
        torch.set_num_threads(1)
    memory = {variant: memory_of(variant, options) for variant in VARIANTS}
    prepared = {variant: prepare(variant, setting) for variant in VARIANTS}
    seconds = interleaved({name: one.step for name, one in prepared.items()}, rounds=options.rounds, warmup=WARMUP, device=setting.device)
    work = flops(setting, build(setting.architecture, length=setting.length, seed=0))
    speed = matmul_speed(setting.device, torch.bfloat16 if setting.fast else torch.float32)
    rows = {}
    for variant in VARIANTS:
        middle, low, high = ratio(seconds, variant)
        usual = statistics.median(seconds[variant])
        rows[variant] = {
            "step_ms": 1e3 * usual,
            "tokens_per_second": setting.tokens / usual,
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "ratio_of_means": statistics.fmean(seconds[variant]) / statistics.fmean(seconds["plain"]),
            "share_of_matmul_speed": work / usual / speed,
            "memory_mb": memory[variant],
            "memory_ratio": memory[variant] / memory["plain"],
            "path": prepared[variant].path,
        }
    return {"quantized_weights": prepared["plain"].elements, "matmul_flops_per_second": speed, "flops_per_step": work, "variants": rows}


def show(result: dict[str, Any]) -> None:
    print(result["machine"], f"torch {result['torch']}; {result['size']}, {result['tokens']} tokens a step")
    print(f"{'variant':<14} {'ms':>7} {'tokens/s':>9} {'x plain':>8} {'x means':>8} {'of matmul':>9} {'MB':>7} {'MB x':>6}  path")
    for name, row in result["variants"].items():
        print(
            f"{name:<14} {row['step_ms']:>7.1f} {row['tokens_per_second']:>9,.0f} {row['ratio']:>8.3f} {row['ratio_of_means']:>8.3f} "
            f"{row['share_of_matmul_speed']:>9.1%} {row['memory_mb']:>7.0f} {row['memory_ratio']:>6.3f}  {row['path']}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="15m", choices=("1m", "15m", "150m", "300m"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lm_step.json")
    parser.add_argument("--memory-of", choices=VARIANTS)
    options = parser.parse_args(arguments)
    setting = setting_of(options)
    if options.memory_of:
        print(measure_memory(options.memory_of, setting))
        return
    device = setting.device.type == "cuda"
    machine = torch.cuda.get_device_name() if device else f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()}"
    told = {"machine": machine, "torch": torch.__version__, "size": options.size, "rows": options.rows, "length": options.length}
    result = {**told, "tokens": setting.tokens, "rounds": options.rounds, **table(setting, options)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
