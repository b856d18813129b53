"""Training steps of a Llama-like model under every method that is compared, for the benchmarks that time them.

Everybody gets torch's fused AdamW, or `sw.optim.AdamW`, which is that with a method in it; float32 weights, INT4 in blocks of 32 in all
Linear layers but the head. On a GPU the forward pass runs under bf16 autocast in a compiled model.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import stepwell as sw
from stepwell.train.language import build
from stepwell.train.recipe import Architecture

BITS, BLOCK, SKIP = 4, 32, "lm_head"
VARIANTS = ("plain", "ste", "lotion", "ste + lotion", "torchao qat", "torchao parq")
MATMUL = 4096  # side of the square product whose speed stands for what the device can do


class Setting(NamedTuple):
    """What every variant trains.

    Attributes:
        architecture: of the model.
        rows, length: sequences per step, and tokens that each predicts.
        device: where.
        fast: bf16 autocast and torch.compile, as on a GPU.
    """

    architecture: Architecture
    rows: int
    length: int
    device: torch.device
    fast: bool

    @property
    def tokens(self) -> int:
        """Loss terms of a step."""
        return self.rows * self.length


class Prepared(NamedTuple):
    """One variant, ready to step.

    Attributes:
        step: takes one training step.
        elements: how many weights are quantized.
        path: how ours runs, as the Run says; empty for the others.
    """

    step: Callable[[], None]
    elements: int
    path: str


def method_of(variant: str, quantizer: sw.Quantizer, terms: int) -> Any:
    """Return our method of a variant's name, or None for one that is not ours."""
    made = {
        "ste": lambda: sw.ste(quantizer),
        "lotion": lambda: sw.lotion(quantizer, loss_terms=terms),
        "ste + lotion": lambda: sw.lotion(quantizer, loss_terms=terms, forward="nearest"),
    }
    return made[variant]() if variant in made else None


def prepare(variant: str, setting: Setting) -> Prepared:
    """Build a variant's model and optimizer."""
    model = build(setting.architecture, length=setting.length, seed=0).to(setting.device)
    inner = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != SKIP}
    if variant == "torchao qat":
        fake_quantized(model)
    method, path = method_of(variant, sw.int4(block=BLOCK), setting.tokens), ""
    optimizer: Any = (sw.optim.AdamW if method is not None and setting.device.type == "cpu" else _fused)(model.parameters(), lr=1e-4)
    if method is not None:
        path = sw.attach(model, method, optimizer, skip=[SKIP])._stepper.path
    if variant == "torchao parq":
        optimizer = annealed(optimizer, [module.weight for module in inner.values()])
    forward: Any = torch.compile(model) if setting.fast else model
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(setting.architecture.vocabulary, (setting.rows, setting.length + 1), generator=generator).to(setting.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.fast):
            logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return Prepared(step, sum(module.weight.numel() for module in inner.values()), path)


def fake_quantized(model: nn.Module) -> None:
    """Make torchao's QAT of a model's Linear layers: fake quantization of weights in every forward pass."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = QATConfig(weight_config=IntxFakeQuantizeConfig(getattr(torch, f"int{BITS}"), group_size=BLOCK), step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != SKIP)


def annealed(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Return torchao's PARQ around an optimizer, with its own defaults; it maps the weights every ten steps."""
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import UnifQuantizer

    chosen, group = {id(weight) for weight in weights}, optimizer.param_groups[0]
    group["params"] = [one for one in group["params"] if id(one) not in chosen]
    settings = {name: value for name, value in group.items() if name != "params"}
    optimizer.add_param_group({**settings, "params": list(weights), "quant_bits": BITS, "quant_block_size": BLOCK})
    around: torch.optim.Optimizer = QuantOptimizer(
        optimizer, UnifQuantizer(), ProxPARQ(anneal_start=1, anneal_end=10_000), warmup_steps=1, quant_per_channel=True
    )
    return around


def interleaved(steps: dict[str, Callable[[], None]], *, rounds: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Return every variant's seconds in every round; each round runs each once, in an order that rotates."""
    names, seconds = list(steps), {name: [] for name in steps}  # type: dict[str, list[float]]
    for turn in range(warmup + rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            begun = clock(device)
            steps[name]()
            if turn >= warmup:
                seconds[name].append(clock(device) - begun)
        print(f"\rround {turn + 1} of {warmup + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def clock(device: torch.device) -> float:
    """Return seconds once the device has done what it was asked: of the wall on a GPU, of this process on a CPU that others use too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def ratio(seconds: dict[str, list[float]], name: str, reference: str = "plain") -> tuple[float, float, float]:
    """Return the median and the quartiles of a variant's time over the reference's within a round."""
    paired = sorted(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))
    return statistics.median(paired), paired[len(paired) // 4], paired[-1 - len(paired) // 4]


def flops(setting: Setting, model: nn.Module) -> float:
    """Return the arithmetic of a step's matrix products: 6 per weight and token, and attention's, half of it masked."""
    shape = setting.architecture
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name)
    weights += shape.vocabulary * shape.width if shape.tied else 0
    return setting.tokens * (6.0 * weights + 6.0 * shape.layers * shape.width * setting.length)


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the arithmetic per second of a large square product on this device, the best of ten."""
    side = MATMUL if device.type == "cuda" else MATMUL // 4
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begun = clock(device)
        a @ b
        best = min(best, clock(device) - begun)
    return 2.0 * side**3 / best


def _fused(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)
