"""Trials in which every rank sees rows of its own, as data-parallel training does, so that gradients are sums in another order.

Some steps average over two micro-batches, and the last rows of some are missing: the second rank then holds fewer. `sharded_worker` runs
them on two ranks, `test_sharded_data` on one.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from tests.cases import seeded
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stepwell as sw
from stepwell.methods.base import Method
from stepwell.schedules import exponential
from stepwell.train.quantize import recipe

STEPS, ROWS, FEWER, SPLIT = 20, 8, {5: 6, 18: 6}, 3  # every third step has two micro-batches
Q = sw.int3(block=8)
TENSOR, AFFINE = sw.intn(3, block=None), sw.intn(3, block=None, levels="affine")
SCALED = sw.intn(3, block=8, scale_dtype="e4m3")

CASES: dict[str, Callable[[], Method]] = {
    "ste + lotion": lambda: sw.lotion(Q, forward="nearest"),
    "default": lambda: recipe(Q, steps=STEPS),
    "tensor scale": lambda: sw.ste(TENSOR),
    "tensor scale, affine": lambda: sw.ste(AFFINE),
    "tensor scale, lotion": lambda: sw.lotion(TENSOR, through_scale=False),
    "tensor scale, prox": lambda: sw.prox(TENSOR, strength=exponential(1, 1e3, steps=STEPS), forward="nearest"),
    "scale of scales": lambda: sw.lotion(SCALED, forward="nearest"),
    "scale of scales, default": lambda: recipe(SCALED, steps=STEPS),
}
REPLICATED = ("default",)  # under DDP every rank does everything
NARROW = ("ste + lotion", "default")  # in float32
COUNTED = {"ste + lotion": 0, "tensor scale": 1, "tensor scale, lotion": 1, "scale of scales": 1, "scale of scales, default": 1}


def network(dtype: torch.dtype) -> nn.Sequential:
    """Return 16 -> 5 -> 6 -> 1, padded so that blocks of 8 divide the next layer's inputs: shards of 3 and 2, 3 and 3, 1 and 0 rows."""
    torch.manual_seed(0)
    pad = nn.ConstantPad1d
    layers = [nn.Linear(16, 5), nn.Tanh(), pad((0, 3), 0.5), nn.Linear(8, 6), nn.Tanh(), pad((0, 2), 0.5), nn.Linear(8, 1)]
    return nn.Sequential(*layers).to(dtype)


def sharded(model: nn.Sequential) -> nn.Module:
    """Return the network under FSDP2, every Linear layer by itself."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module, seen: nn.Module, name: str, *, rank: int = 0, size: int = 1, watch: bool = False) -> dict[str, object]:
    """Train for 20 steps; return losses over all rows, the latent weights after every step or the last, health and what is shipped.

    Args:
        model: whose parameters are managed.
        seen: what runs forward: the model, or its DDP wrapper.
        name: of the case.
        rank, size: whose rows.
        watch: record latent weights and codes after every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    run = sw.attach(model, CASES[name](), optimizer, seed=5)
    generator, losses, latents, codes = seeded(3), [], [], []
    dtype = next(model.parameters()).dtype
    run.health()
    for step in range(STEPS):
        rows = FEWER.get(step, ROWS)
        inputs, targets = (torch.randn(ROWS, width, generator=generator, dtype=torch.float64).to(dtype)[:rows] for width in (16, 1))
        mine = slice(rank * (ROWS // size), (rank + 1) * (ROWS // size))
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        parts = 1 if step % SPLIT else 2
        for x, y in zip(inputs[mine].chunk(parts), targets[mine].chunk(parts), strict=True):
            loss = nn.functional.mse_loss(seen(x), y, reduction="sum")
            (loss * size / rows).backward()  # ranks' gradients are averaged; a step averages over all rows
            total += loss.detach()
        if size > 1:
            dist.all_reduce(total)
        losses.append(float(total) / rows)
        run.loss_terms = rows
        optimizer.step()
        if watch or step == STEPS - 1:
            latents.append(held(run, model))
            codes.append({key: one.codes for key, one in run.encoded().items()})
    with run.deployed():
        shown = whole(model)
    vitals = {
        key: [getattr(row, part) for part in ("elements", "flips", "distance", "clipped")] for key, row in run.health().parameters.items()
    }
    decoded = {key: one.decode() for key, one in run.finalize().items()}
    return {
        "losses": losses,
        "latents": latents,
        "codes": codes,
        "deployed": shown,
        "health": vitals,
        "decoded": decoded,
        "left": whole(model),
    }


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter, gathered."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()) for name, tensor in found.items()}


def held(run: sw.Run, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every latent weight, gathered."""
    with run.latent():
        return whole(model)


def collectives(name: str, steps: int = 3) -> list[int]:
    """Return how many numbers each all-reduce of the last step moves."""
    model = sharded(network(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    run = sw.attach(model, CASES[name](), optimizer)
    run.loss_terms = ROWS
    moved: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        moved.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    for _ in range(steps):
        nn.functional.mse_loss(model(torch.ones(4, 16, dtype=torch.float64)), torch.zeros(4, 1, dtype=torch.float64)).backward()
        moved.clear()
        dist.all_reduce = counting
        try:
            optimizer.step()
        finally:
            dist.all_reduce = reduce
    return moved


def placements() -> list[tuple[str, bool, bool]]:
    """Return (type, same mesh and placements as its parameter, local shape as its parameter's) of every latent weight."""
    model = sharded(network(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sw.attach(model, CASES["tensor scale"](), optimizer)
    state, parameters = optimizer.state_dict()["state"], list(model.parameters())
    return [
        (
            type(latent).__name__,
            (latent.device_mesh, latent.placements) == (parameters[k].device_mesh, parameters[k].placements),
            latent.to_local().shape == parameters[k].to_local().shape,
        )
        for k, entry in state.items()
        if (latent := entry.get("latent")) is not None
    ]


def trials(rank: int, size: int) -> dict[str, dict[str, object]]:
    """Run everything on this rank."""
    found: dict[str, dict[str, object]] = {"sharded": {}, "replicated": {}, "narrow": {}}
    for name in CASES:
        model = sharded(network(torch.float64))
        found["sharded"][name] = train(model, model, name, rank=rank, size=size)
    for name in REPLICATED:
        plain = network(torch.float64)
        found["replicated"][name] = train(plain, DistributedDataParallel(plain), name, rank=rank, size=size)
    for name in NARROW:
        model = sharded(network(torch.float32))
        found["narrow"][name] = train(model, model, name, rank=rank, size=size, watch=True)
    return {**found, "collectives": {name: collectives(name) for name in COUNTED}, "placements": {"all": placements()}}
