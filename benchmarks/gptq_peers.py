"""Does our GPTQ leave more error in a layer than llm-compressor's and GPTQModel's? The same layers, inputs and grids, in one process.

    python benchmarks/gptq_peers.py [--out benchmarks/results/gptq_peers.json]

Needs one peer or both, in an environment of its own (they want other versions of transformers than we pin; the CPU is enough):

    pip install -c constraints.txt torch transformers loguru accelerate datasets psutil threadpoolctl
    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round && pip install --no-deps -e .
    pip install device-smi pypcre tokenicer logbar dill defuser ninja && pip install --no-deps gptqmodel==7.7.0

Where both are absent the script says so and leaves the results alone.

Layers: random weights with correlated inputs, with fewer inputs than columns (a singular Hessian), and with outliers in weights and input
channels; and the four matrices of the last block of a small byte-level transformer after 100 training steps, with the inputs that they see.
Grids: 4 and 3 bits with all 2^b codes, scales absmax / (2^b - 1) * 2 per group of 128 or per channel, taken from the weight before the loop
("static groups"), damping 1 %, columns in natural order or by activation. The error is |(Q - W) X|^2 in float64, as a share of round to
nearest on the same grid. Called are the layer functions: `quantize_weight` of llm-compressor, the class `GPTQ` of GPTQModel. Where the
Hessian is nearly singular, float32 decides near ties, and one of them changes all columns behind it: errors scatter by a percent, up and
down, as the same loop in float64 shows. For orientation, on other grids: GPTQModel as it comes (scales refitted inside the loop,
group-aware order), and ours with searched scales.
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import processor
from torch import Tensor, nn

import stepwell as sw
from stepwell.ptq.sequential import sequential
from stepwell.train.corpus import load_corpus
from stepwell.train.transformer import byte_loss, byte_transformer

DAMPING, GROUP, WIDTH, LENGTH, STEPS = 0.01, 128, 256, 128, 100
PEERS = {"llm-compressor": "llmcompressor", "GPTQModel": "gptqmodel"}


class Layer(NamedTuple):
    """A weight `(rows, columns)` and the inputs `(count, columns)` that it sees."""

    weight: Tensor
    inputs: Tensor


class Grid(NamedTuple):
    """Bits and columns per scale; None is the whole row."""

    bits: int
    group: int | None

    def scale(self, weight: Tensor) -> Tensor:
        """Return scales `(rows, groups)` that put the largest weight half a step beyond the highest code, as the peers do."""
        blocks = weight.reshape(len(weight), -1, self.group or weight.shape[1])
        return blocks.abs().amax(-1) * 2 / (2**self.bits - 1)

    def quantizer(self, rule: str = "absmax") -> sw.Quantizer:
        """Return the grid with all 2^b codes."""
        return sw.intn(self.bits, block=self.group or "channel", levels="full", scale=rule)

    def __str__(self) -> str:
        return f"int{self.bits} {'channel' if self.group is None else f'group {self.group}'}"


GRIDS = tuple(Grid(bits, group) for bits in (4, 3) for group in (GROUP, None))
Rounding = Callable[[Layer, Grid, bool], Tensor]  # (layer, grid, columns by activation) -> rounded weight


def ours(layer: Layer, grid: Grid, by_activation: bool) -> Tensor:
    hessian = layer.inputs.T @ layer.inputs / len(layer.inputs)
    order = "activation" if by_activation else "natural"
    return sequential(layer.weight, hessian, grid.quantizer(), damping=DAMPING, order=order, scale=grid.scale(layer.weight)).decode()


def ours_in_float64(layer: Layer, grid: Grid, by_activation: bool) -> Tensor:
    return ours(Layer(layer.weight.double(), layer.inputs.double()), grid, by_activation)


def ours_searched(layer: Layer, grid: Grid, by_activation: bool) -> Tensor:
    hessian = layer.inputs.T @ layer.inputs / len(layer.inputs)
    scale = sw.ptq.scale_search(layer.weight, grid.quantizer("mse"), hessian.diagonal().expand_as(layer.weight))
    order = "activation" if by_activation else "natural"
    return sequential(layer.weight, hessian, grid.quantizer(), damping=DAMPING, order=order, scale=scale).decode()


def llm_compressor(layer: Layer, grid: Grid, by_activation: bool) -> Tensor:
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    hessian, scale = 2 * layer.inputs.T @ layer.inputs / len(layer.inputs), grid.scale(layer.weight)
    options = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=True,
        strategy="channel" if grid.group is None else "group",
        group_size=grid.group,
        actorder=ActivationOrdering.WEIGHT if by_activation else None,
    )
    zeros = torch.zeros_like(scale)[None]
    rounded, _, fell_back = quantize_weight(layer.weight[None].clone(), hessian[None], scale[None], zeros, None, options, percdamp=DAMPING)
    if bool(fell_back.any()):
        raise RuntimeError("llm-compressor fell back to rounding to nearest: its Hessian could not be inverted")
    return rounded[0]


def gptqmodel(layer: Layer, grid: Grid, by_activation: bool) -> Tensor:
    return _gptqmodel(layer, grid, desc_act=by_activation, act_group_aware=False, static_groups=grid.group is not None)


def gptqmodel_own(layer: Layer, grid: Grid, by_activation: bool) -> Tensor:
    return _gptqmodel(
        layer, grid, desc_act=by_activation, act_group_aware=not by_activation and grid.group is not None, static_groups=False
    )


def _gptqmodel(layer: Layer, grid: Grid, **options: bool) -> Tensor:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    held = nn.Linear(*reversed(layer.weight.shape), bias=False)
    held.weight.data = layer.weight.clone()
    config = QuantizeConfig(bits=grid.bits, group_size=grid.group or -1, sym=True, damp_percent=DAMPING, offload_to_disk=False, **options)
    task = GPTQ(held, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(layer.inputs[None], None)
    return task.quantize()[0]


def layers() -> dict[str, Layer]:
    """Return what is rounded."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def mixed(count: int, columns: int) -> Tensor:
        strong = normal(columns, 4) @ normal(4, columns) / columns**0.5
        return normal(count, columns) @ (torch.eye(columns) + 0.5 * normal(columns, columns) / columns**0.5 + strong)

    outliers = mixed(2048, 512) * torch.where(torch.rand(512, generator=generator) < 0.02, 20.0, 1.0)
    tails = normal(768, 512) * torch.where(torch.rand(768, 512, generator=generator) < 0.01, 6.0, 1.0)
    return {
        "correlated inputs, 1024 x 1024": Layer(normal(1024, 1024), mixed(4096, 1024)),
        "400 inputs, 512 x 1024": Layer(normal(512, 1024), mixed(400, 1024)),
        "outliers, 768 x 512": Layer(tails, outliers),
        **real_layers(),
    }


def real_layers() -> dict[str, Layer]:
    """Return the matrices of the last block of a transformer that was trained a little, with their inputs."""
    corpus, seen = load_corpus(), {}

    def batch(text: Tensor, count: int, seed: int) -> Tensor:
        starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=torch.Generator().manual_seed(seed))
        return torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).long()

    model = byte_transformer(width=WIDTH, layers=2, heads=4, length=LENGTH, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        byte_loss(model, batch(corpus.train, 8, step)).backward()
        optimizer.step()
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.1.")}
    for name, module in matrices.items():
        module.register_forward_pre_hook(lambda module, given, name=name: seen.__setitem__(name, given[0].flatten(0, 1)))  # type: ignore[misc]
    with torch.no_grad():
        byte_loss(model, batch(corpus.train, 32, STEPS))
    return {f"transformer {name}": Layer(module.weight.detach().clone(), seen[name]) for name, module in matrices.items()}


def installed() -> dict[str, str]:
    """Return the versions of the peers that are here."""
    found = {}
    for peer, package in PEERS.items():
        try:
            found[peer] = version(package)
        except PackageNotFoundError:
            print(f"{peer} is not installed: left out. `pip install {package}`, as the head of this file says.", file=sys.stderr)
    return found


def compare(peers: dict[str, str]) -> list[dict[str, Any]]:
    """Return one row per layer, grid and order: errors over round to nearest, and the share of weights unlike ours."""
    same: dict[str, Rounding] = {"ours": ours}
    other: dict[str, Rounding] = {"ours in float64": ours_in_float64, "ours, searched scales": ours_searched}
    if "llm-compressor" in peers:
        same["llm-compressor"] = llm_compressor
    if "GPTQModel" in peers:
        same["GPTQModel"], other["GPTQModel, own scales"] = gptqmodel, gptqmodel_own
    rows = []
    for name, layer in layers().items():
        inputs = layer.inputs.double()
        for grid in GRIDS:
            base = _error(grid.quantizer()(layer.weight, scale=grid.scale(layer.weight)), layer.weight, inputs)
            for by_activation in (False, True):
                found = {key: rule(layer, grid, by_activation) for key, rule in {**same, **other}.items()}
                rows.append(
                    {
                        "layer": name,
                        "grid": str(grid),
                        "order": "activation" if by_activation else "natural",
                        "error_over_rtn": {key: _error(rounded, layer.weight, inputs) / base for key, rounded in found.items()},
                        "unlike_ours": {key: float(((found[key] - found["ours"]).abs() > 1e-5).double().mean()) for key in same},
                    }
                )
                print(f"\r{name:<40} {grid!s:<16}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def _error(rounded: Tensor, weight: Tensor, inputs: Tensor) -> float:
    return float(((rounded - weight).double() @ inputs.T).square().sum())


def spread(ratios: list[float]) -> dict[str, float]:
    """Return least, geometric mean and largest."""
    return {"least": min(ratios), "mean": math.exp(sum(map(math.log, ratios)) / len(ratios)), "largest": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gptq_peers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peers = installed()
    if not peers:
        print("no peer to compare with: nothing measured, results left as they are")
        return
    rows = compare(peers)
    over = {
        peer: spread([row["error_over_rtn"]["ours"] / row["error_over_rtn"][peer] for row in rows]) for peer in [*peers, "ours in float64"]
    }
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread used; {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "peers": peers,
        "error_of_ours_over": over,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    columns = list(rows[0]["error_over_rtn"])
    print(f"{'layer':<32} {'grid':<16} {'order':<11} " + " ".join(f"{name:>22}" for name in columns))
    for row in rows:
        numbers = " ".join(f"{row['error_over_rtn'][name]:>22.5f}" for name in columns)
        print(f"{row['layer']:<32} {row['grid']:<16} {row['order']:<11} {numbers}")
    for peer, ratio in over.items():
        unlike = max(row["unlike_ours"].get(peer, 0.0) for row in rows)
        numbers = f"mean {ratio['mean']:.5f}, {ratio['least']:.5f} to {ratio['largest']:.5f}"
        print(f"ours / {peer} {peers.get(peer, '')}: {numbers}; at most {unlike:.2%} of a layer's weights differ")


if __name__ == "__main__":
    main()
