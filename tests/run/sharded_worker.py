"""One rank of a sharded run: `torchrun -m tests.run.sharded_worker FOLDER` trains on two ranks and writes what the tests compare.

Here both ranks see the same batch (in `data_parallel` rows of their own), so that the averaged gradient is that of one process. Weights
have 5, 6 and 1 rows: shards are uneven, and the second rank holds nothing of the last.
"""

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tests.cases import METHODS, seeded
from tests.run import data_parallel
from tests.run.throwaway import everything
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import stepwell as sw
from stepwell.methods.base import Method

STEPS, STOP = 6, 3
Q = sw.int3(block=8)


def network(seed: int) -> nn.Sequential:
    """Return 16 -> 5 -> 6 -> 1, each padded so that blocks of 8 divide the next layer's inputs."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.ConstantPad1d((0, 3), 0.5),
        nn.Linear(8, 6),
        nn.Tanh(),
        nn.ConstantPad1d((0, 2), 0.5),
        nn.Linear(8, 1),
    )


def methods() -> dict[str, Method]:
    """Return what is compared; searched scales and own tensors travel as shards, draws are those of the whole parameter."""
    return {
        "ste": sw.ste(Q),
        "lotion": sw.lotion(Q, loss_terms=8),
        "ste + lotion": sw.lotion(Q, loss_terms=8, forward="nearest"),
        "searched": sw.ste(sw.intn(3, block=8, scale="mse", levels="affine")),
        "randomized": everything(Q)["randomized"],
        "learned scale": everything(Q)["learned scale"],
        **{name: METHODS[name](Q) for name in ("lsq", "default", "own curvature", "sampled", "learned scales, latent")},
    }


def data():
    """Return every step's inputs `(8, 16)` and targets `(8, 1)`."""
    generator = seeded(3)
    return [(torch.randn(8, 16, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(STEPS)]


def attach(model: nn.Module, name: str):
    """Return an optimizer and the run of a method on it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return optimizer, sw.attach(model, methods()[name], optimizer, seed=5, refit=2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, pairs) -> list[float]:
    """Train; return the losses."""
    losses = []
    for inputs, targets in pairs:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(seed: int) -> nn.Module:
    """Return the network with every layer sharded by rows."""
    model = network(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def trial(name: str) -> dict[str, object]:
    """Train, resume a second run from the middle of the first, and finalize both."""
    model = sharded(0)
    optimizer, run = attach(model, name)
    losses = steps(model, optimizer, data()[:STOP])
    whole = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=whole))  # step counts are handed out, not copied
    held = {key: value.full_tensor().clone() for key, value in model.state_dict().items()}
    losses += steps(model, optimizer, data()[STOP:])
    encoded = run.finalize()

    again = sharded(9)
    made, resumed = attach(again, name)
    for key, parameter in again.state_dict().items():
        parameter.copy_(torch.distributed.tensor.distribute_tensor(held[key], parameter.device_mesh, parameter.placements))
    set_optimizer_state_dict(again, made, saved, options=whole)
    later = steps(again, made, data()[STOP:])
    return {
        "losses": losses,
        "resumed": later,
        "codes": {key: value.codes for key, value in encoded.items()},
        "scales": {key: value.scales for key, value in encoded.items()},
        "resumed codes": {key: value.codes for key, value in resumed.finalize().items()},
        "weights": {key: value.full_tensor() for key, value in model.state_dict().items()},
    }


def looked(model: nn.Module) -> dict[str, object]:
    """Look between two steps: forward passes without gradients, which leave the weights of FSDP2's root whole, bare and on the grid."""
    optimizer, run = attach(model, "lotion")
    (inputs, _), found = data()[0], {}
    for step, pair in enumerate(data()[:STOP]):
        steps(model, optimizer, [pair])
        with torch.no_grad():
            found[f"latent {step}"] = model(inputs)
            found[f"clipped {step}"] = torch.tensor(run.health().total.clipped)
            with run.deployed():
                found[f"deployed {step}"] = model(inputs)
            found[f"again {step}"] = model(inputs)
    return found | {f"weight {name}": encoded.decode() for name, encoded in run.finalize().items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*(outside the run|latent weights).*")
    dist.init_process_group("gloo")
    found = {
        "same rows": {name: trial(name) for name in methods()},
        "looked": looked(fully_shard(network(0))),
        "own rows": data_parallel.trials(dist.get_rank(), dist.get_world_size()),
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
