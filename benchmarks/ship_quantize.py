"""What does `stepwell quantize` hold and how fast is it? Memory and time at three sizes, and weights per second beside other quantizers.

    python benchmarks/ship_quantize.py [--only size|speed|files] [--rounds 7] [--out benchmarks/results/ship_quantize.json]

Sizes: random Llamas, in bfloat16 and shards, are quantized in a process of their own: streamed (RTN, no data) to three targets, and
with the model in memory by RTN and GPTQ, up to the codes (the model is float32 there). Memory is how far the process grew at most over its
size with all libraries loaded; what of a file is mapped counts while it is mapped. "Layer" is measured alike: the most that any one of
the model's layers takes alone, an input for GPTQ included. The bound for a model in memory is its size in float32 and that. Peaks are
medians of five runs after a first, all of which are in the file, but for streamed ones.
Time is processor time of one thread.

Speed: one weight of 2048 x 4096 in float32, from the weight to the bytes in the file. Ours, compressed-tensors' own (`calculate_qparams`,
`PackedQuantizationCompressor`) to int4 in blocks of 32, `gguf`'s (`gguf.quants.quantize`) to Q4_0 and Q8_0, and ggml's in C where
llama-cpp-python is installed; medians of interleaved rounds, processor time of one thread.

Files: the 63M Llama from a checkpoint in bfloat16 to a GGUF file by us, reading it again and comparing included, and from a GGUF file in
float32 to the same by llama.cpp's `llama_model_quantize`; medians of interleaved rounds, processor time of one thread.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import ggml, processor

import stepwell as sw

ROOT = Path(__file__).parents[1]
SIZES = {
    "7M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 4, "vocab_size": 4096},
    "22M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 4096},
    "63M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096},
}
STREAMED = ("safetensors", "compressed-tensors:int4", "gguf:q4_0")
RUNS = (*STREAMED, "in memory, rtn", "in memory, gptq", "layer, rtn", "layer, gptq")
REPEATS = 5
GGUF = ("Q4_0", "Q8_0")
PATIENCE = 1800  # seconds of one run


def make(folder: Path, size: str) -> None:
    """Write a random Llama, in shards of 100 MB."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[size], num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="100MB")


def resident(what: str) -> int:
    """Return the process's resident size now ("VmRSS") or at most ("VmHWM"), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def one(folder: Path, run: str) -> dict[str, Any]:
    """Quantize in this process and return what it took."""
    import transformers  # noqa: F401 - loaded before the size is taken

    from stepwell.ship.source import folder_of, meta_model

    torch.set_num_threads(1)
    model = meta_model(folder)  # what it imports
    checkpoint = folder_of(str(folder))
    assert checkpoint is not None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with tempfile.TemporaryDirectory() as place:
        before, began = resident("VmRSS"), time.process_time()
        if run in STREAMED:
            found = streamed(checkpoint, run, Path(place))
        elif run.startswith("layer"):
            found = layers(model, run, Path(place))
        else:
            found = in_memory(folder, run, Path(place))
        return {"run": run, "peak_bytes": resident("VmHWM") - before, "seconds": time.process_time() - began, **found}


def middle(folder: Path, run: str) -> dict[str, Any]:
    """Return the run with the median peak, with a model or a layer in memory: resident sizes scatter by some percent."""
    if run in STREAMED:
        return one(folder, run)
    one(folder, run)  # the first is the highest, since nothing that was freed is there to be used again
    found = sorted((one(folder, run) for _ in range(REPEATS)), key=lambda each: each["peak_bytes"])
    return {**found[REPEATS // 2], "peaks": [each["peak_bytes"] for each in found]}


def streamed(checkpoint: Any, target: str, place: Path) -> dict[str, Any]:
    """Quantize without the model in memory."""
    from stepwell.ship.quantize import Order
    from stepwell.ship.stream import stream

    with stream(checkpoint, Order(target, "rtn"), place / "out", progress=silent) as shipped:
        assert shipped.certificate.passed
        return {"parameters": shipped.total, "quantized": shipped.elements, "wall": shipped.seconds}


def in_memory(folder: Path, run: str, place: Path) -> dict[str, Any]:
    """Load the model and round it, up to the codes on the disk."""
    from stepwell.ship.plan import plan
    from stepwell.ship.source import open_source

    source = open_source(str(folder), None, limit=1, window=None)
    chosen = plan(source.model, sw.target("safetensors"))
    loaded = resident("VmHWM")
    batches = list(torch.randint(4096, (2, 2, 64), generator=torch.Generator().manual_seed(0)))
    rounded(source.model, chosen, run.rpartition(" ")[2], source.loss, batches, place)
    return {"parameters": chosen.total, "quantized": chosen.elements, "peak_when_loaded": loaded}


def layers(model: torch.nn.Module, run: str, place: Path) -> dict[str, Any]:
    """Round one Linear of every shape of the model, one after the other, each alone in memory."""
    from stepwell.ship.plan import plan

    grid = sw.target("safetensors")
    shapes = {tuple(model.get_parameter(name).shape) for name in plan(model, grid).grids}
    most = 0
    for rows, columns in sorted(shapes):
        layer = torch.nn.Linear(columns, rows, bias=False)
        batches = [torch.randn(128, columns) for _ in range(2)]
        rounded(layer, plan(layer, grid), run.rpartition(" ")[2], lambda one, x: one(x).sum(), batches, place / f"{rows}x{columns}")
        most = max(most, 4 * rows * columns)
    return {"largest_weight_bytes": most}


def rounded(model: torch.nn.Module, chosen: Any, method: str, loss: Any, batches: list[Any], place: Path) -> None:
    """Round by a method, codes onto the disk."""
    from stepwell.ship import rounding
    from stepwell.ship.spill import Spill

    if method == "rtn":
        rounding.rtn(model, chosen, Spill(place), progress=silent)
    else:
        rounding.by_gptq(model, chosen, Spill(place), loss=loss, batches=batches, progress=silent)


def silent(words: str, done: int, total: int) -> None:
    """Say nothing."""


def sizes(rows: list[dict[str, Any]], keep: Callable[[], None]) -> None:
    """Run every size and way in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        for size in SIZES:
            if {(size, run) for run in RUNS} <= {(row["size"], row["run"]) for row in rows}:
                continue
            folder = Path(place) / size
            make(folder, size)
            # glibc otherwise raises its own limit for mapped memory, and what is freed below it stays resident
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
            command = [sys.executable, __file__, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            rows += [{"size": size, **json.loads(line)} for line in done.stdout.splitlines() if line.startswith("{")]
            keep()


def quantizers(weight: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return every way from a weight to the bytes of a file."""
    import gguf
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    from stepwell.export import compressed_tensors_scheme, gguf_blocks
    from stepwell.storage import parts

    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    symmetric = sw.intn(4, block=32, levels="symmetric", scale_dtype="bf16")
    array = weight.numpy()

    def theirs() -> Any:
        blocks = weight.unflatten(-1, (-1, 32))
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        return PackedQuantizationCompressor.compress(state, scheme)

    def blocks_of(target: str) -> Callable[[], Any]:
        grid = sw.target(target)

        def make() -> Any:
            encoded = grid.encode(weight)
            return gguf_blocks.pack(encoded, gguf_blocks.choose(encoded))

        return make

    theirs_in_c = {f"ggml, {kind}": partial(ggml.quantize, array, kind) for kind in GGUF if ggml.available()}
    return {
        "stepwell, safetensors int4": lambda: parts("w", sw.target("safetensors").encode(weight)),
        "stepwell, compressed-tensors int4": lambda: compressed_tensors_scheme.tensors(symmetric.encode(weight)),
        "compressed-tensors, int4": theirs,
        "stepwell, gguf Q4_0": blocks_of("gguf:q4_0"),
        "gguf, Q4_0": lambda: gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0),
        "stepwell, gguf Q8_0": blocks_of("gguf:q8_0"),
        "gguf, Q8_0": lambda: gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0),
        **theirs_in_c,
    }


def speed(rounds: int) -> list[dict[str, Any]]:
    """Return weights per second of every quantizer, medians of interleaved rounds."""
    torch.set_num_threads(1)
    weight = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    ways = quantizers(weight)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, way in ways.items():
                began = time.process_time()
                way()
                if turn:
                    seconds[name].append(time.process_time() - began)
    return [
        {"way": name, "weights_per_second": weight.numel() / statistics.median(each), "best": weight.numel() / min(each)}
        for name, each in seconds.items()
    ]


def files(rounds: int) -> list[dict[str, Any]]:
    """Return parameters per second from file to file, medians of interleaved rounds."""
    from stepwell.ship.source import folder_of, open_source

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make(place / "llama", "63M")
        checkpoint, model = folder_of(str(place / "llama")), open_source(str(place / "llama"), None, limit=1, window=None).model
        small = "model.layers.0.self_attn.k_proj.weight"  # the export wants one encoded weight
        sw.export.gguf(model, {small: sw.target("gguf:q8_0").encode(model.get_parameter(small))}, place / "float.gguf")
        total = sum(parameter.numel() for parameter in model.parameters())
        del model
        for turn in range(rounds + 1):
            for kind in GGUF:
                began = time.process_time()
                streamed(checkpoint, f"gguf:{kind.lower()}", place / "ours" / kind)
                spent = {f"stepwell, {kind}": time.process_time() - began}
                began = time.process_time()
                ggml.quantize_file(place / "float.gguf", place / "theirs.gguf", kind)
                spent[f"llama.cpp, {kind}"] = time.process_time() - began
                for way, value in spent.items():
                    seconds.setdefault(way, []).extend([value] * bool(turn))
            shutil.rmtree(place / "ours")
    return [
        {"way": name, "parameters": total, "parameters_per_second": total / statistics.median(each), "best": total / min(each)}
        for name, each in seconds.items()
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for every way the exponent of time over parameters (1 is linear), parameters per second, and the peak against its bound."""
    by_run = {run: [row for row in rows if row["run"] == run] for run in RUNS if not run.startswith("layer")}
    layer = {(row["size"], row["run"]): row["peak_bytes"] for row in rows}
    found = {}
    for run, each in by_run.items():
        each.sort(key=lambda row: row["parameters"])
        if len(each) < 2:
            continue
        first, last = each[0], each[-1]
        method = "gptq" if run.endswith("gptq") else "rtn"
        found[run] = {
            "exponent": math.log(last["seconds"] / first["seconds"]) / math.log(last["parameters"] / first["parameters"]),
            "parameters_per_second": {row["size"]: row["parameters"] / row["seconds"] for row in each},
            "peak_over_model": {row["size"]: row["peak_bytes"] / (4 * row["parameters"]) for row in each},
            "peak_over_bound": {
                row["size"]: row["peak_bytes"] / (4 * row["parameters"] * (run not in STREAMED) + layer[row["size"], f"layer, {method}"])
                for row in each
                if (row["size"], f"layer, {method}") in layer
            },
        }
    return found


def main() -> None:
    """Measure what is not in the results yet, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("size", "speed", "files"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ship_quantize.json")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        for run in ("safetensors", "layer, gptq"):
            one(arguments.folder, run)  # first calls load libraries
        for run in RUNS:
            print(json.dumps(middle(arguments.folder, run)), flush=True)
        return
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"sizes": []}

    def keep() -> None:
        results["summary"] = summary(results["sizes"])
        results["machine"] = f"{processor()}, {platform.system()} {platform.machine()}, one thread"
        names = ["torch", "transformers", "compressed-tensors", "gguf", "safetensors", *["llama-cpp-python"] * ggml.available()]
        results["versions"] = {name: version(name) for name in names}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")

    if arguments.only in (None, "size"):
        sizes(results["sizes"], keep)
    if arguments.only in (None, "speed"):
        results["speed"] = speed(arguments.rounds)
        keep()
        for row in results["speed"]:
            print(f"{row['way']:<36} {row['weights_per_second'] / 1e6:8.1f} million weights/s")
    if arguments.only in (None, "files"):
        if not ggml.available():
            print("llama-cpp-python is not installed (extra `runtimes`): no files were compared")
            return
        results["files"] = files(arguments.rounds)
        keep()
        for row in results["files"]:
            print(f"{row['way']:<36} {row['parameters_per_second'] / 1e6:8.1f} million parameters/s")


if __name__ == "__main__":
    main()
