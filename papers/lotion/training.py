"""How the testbeds are trained: every method written out on the library's own grid, rounding and penalty. Running it does nothing.

Float64, the whole gradient, Adam (0.9, 0.999) from zero, a cosine to rate zero. The curvature of the penalty is the testbed's own Hessian
diagonal, so that its gradient may enter both moments without feeding on itself (the paper's form); "first moment only" is `sw.lotion`
through `sw.attach`, which keeps the second moment free of the penalty because on networks that moment is the curvature.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import stepwell as sw
from stepwell.methods.lotion import Rows, penalty_force, penalty_gradient
from stepwell.ptq import scale_search

STEPS, RATES, STRENGTHS = 1500, (0.003, 0.01, 0.03), (0.3, 1.0)
REFIT = 100  # steps between two searches of scales


class Trained(NamedTuple):
    """What a run ends with: latent weights `(dim,)`, and the scales that are stored where they were searched."""

    weight: Tensor
    scale: Tensor | None = None


class Setting(NamedTuple):
    """A run: testbed, grid, learning rate at its largest, strength of the penalty, optimizer steps."""

    bed: sw.Testbed
    quantizer: sw.Quantizer
    rate: float
    strength: float = 0.0
    steps: int = STEPS


Force = Callable[[Tensor, int], Tensor]  # (weight, step) -> the gradient that the optimizer sees


def adam(setting: Setting, force: Force) -> Tensor:
    """Return the weights after training on a gradient; what only fills the last block has no curvature and stays zero."""
    bed, block = setting.bed, setting.quantizer.block
    weight = nn.Parameter(torch.zeros(bed.dim + (-bed.dim % block if isinstance(block, int) else 0), dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=setting.rate, foreach=False)
    for step in range(setting.steps):
        optimizer.param_groups[0]["lr"] = setting.rate * (1 + math.cos(math.pi * step / setting.steps)) / 2
        weight.grad = force(weight.detach(), step)
        optimizer.step()
    return weight.detach()[: bed.dim]


def slope(bed: sw.Testbed, weight: Tensor) -> Tensor:
    """Return the gradient of the testbed's loss, with zeros where the weight is only filling."""
    error = weight[: bed.dim] - bed.target
    found = bed.hessian @ error if bed.rotated else bed.spectrum * error
    return pad(found, (0, len(weight) - bed.dim))


def curvature(bed: sw.Testbed, weight: Tensor) -> Tensor:
    return pad(bed.hessian_diagonal, (0, len(weight) - bed.dim))


def ptq(setting: Setting) -> Trained:
    """Train in float."""
    return Trained(adam(setting, lambda weight, _: slope(setting.bed, weight)))


def searched(setting: Setting) -> Trained:
    """Train in float, then search the scales that the curvature asks for."""
    weight = adam(setting, lambda weight, _: slope(setting.bed, weight))
    filled = pad(weight, (0, -len(weight) % setting.quantizer.block if isinstance(setting.quantizer.block, int) else 0))
    return Trained(weight, scale_search(filled, setting.quantizer, curvature(setting.bed, filled)))


def ste(setting: Setting) -> Trained:
    """Rounded forward pass, identity backward."""
    return Trained(adam(setting, lambda weight, _: slope(setting.bed, setting.quantizer(weight))))


def rat(setting: Setting) -> Trained:
    """Randomly rounded forward pass, identity backward."""
    draws = torch.Generator().manual_seed(0)

    def force(weight: Tensor, _: int) -> Tensor:
        return slope(setting.bed, setting.quantizer(weight, rounding=sw.stochastic(draws)))

    return Trained(adam(setting, force))


def penalised(*, through_scale: bool, nearest: bool) -> Callable[[Setting], Trained]:
    """Return LOTION in the paper's form: the penalty's gradient is part of the gradient."""

    def run(setting: Setting) -> Trained:
        bed, q = setting.bed, setting.quantizer

        def force(weight: Tensor, _: int) -> Tensor:
            pull = penalty_gradient(weight, curvature(bed, weight), q, through_scale=through_scale)
            return slope(bed, q(weight) if nearest else weight).add_(pull, alpha=setting.strength)

        return Trained(adam(setting, force))

    return run


def searching(setting: Setting) -> Trained:
    """LOTION at scales that are searched again every hundred steps; the penalty grows from nothing to the given strength."""
    bed, q = setting.bed, setting.quantizer
    held: dict[str, Tensor] = {}

    def force(weight: Tensor, step: int) -> Tensor:
        diagonal = curvature(bed, weight)
        if step % REFIT == 0 and step:
            held["scale"] = scale_search(weight, q, diagonal)
        if not held:
            return slope(bed, weight)
        blocks, fit, _ = q.prepare(weight, held["scale"])
        growing = torch.tensor(setting.strength * step / setting.steps, dtype=torch.float64)
        pull = penalty_force(blocks, diagonal.reshape(blocks.shape), Rows(q, fit, growing, through_scale=False))
        return slope(bed, weight).add_(pull.flatten())

    weight = adam(setting, force)
    return Trained(weight, held["scale"])


def attached(setting: Setting) -> Trained:
    """`sw.lotion` with the testbed's curvature through `sw.attach`: the penalty reaches the first moment only."""
    bed, q = setting.bed, setting.quantizer
    model = nn.Linear(bed.dim + (-bed.dim % q.block if isinstance(q.block, int) else 0), 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate, foreach=False)
    diagonal = curvature(bed, model.weight[0])[None]
    run = sw.attach(model, sw.lotion(q, strength=setting.strength, curvature={"weight": diagonal}), optimizer, compile=False)
    for step in range(setting.steps):
        optimizer.param_groups[0]["lr"] = setting.rate * (1 + math.cos(math.pi * step / setting.steps)) / 2
        model.weight.grad = slope(bed, model.weight.detach()[0])[None]
        optimizer.step()
    run.detach()
    return Trained(model.weight.detach()[0, : bed.dim])


class Arm(NamedTuple):
    """A method of the tables, and whether it has a strength."""

    train: Callable[[Setting], Trained]
    strengths: tuple[float, ...] = (0.0,)


ARMS = {
    "PTQ": Arm(ptq),
    "STE": Arm(ste),
    "RAT": Arm(rat),
    "LOTION, scale detached": Arm(penalised(through_scale=False, nearest=False), STRENGTHS),
    "LOTION-SG": Arm(penalised(through_scale=True, nearest=False), STRENGTHS),
    "LOTION-SG, strength 1": Arm(penalised(through_scale=True, nearest=False), (1.0,)),
    "LOTION-SG, first moment only": Arm(attached, STRENGTHS),
    "STE + LOTION-SG": Arm(penalised(through_scale=True, nearest=True), STRENGTHS),
    "LOTION + scale search": Arm(searching, (1.0,)),
    "PTQ + scale search": Arm(searched),
}


def losses(setting: Setting, trained: Trained) -> tuple[float, float]:
    """Return the loss under rounding to nearest and its mean under randomized rounding."""
    bed, q, (weight, scale) = setting.bed, setting.quantizer, trained
    filled = pad(weight, (0, -len(weight) % q.block if isinstance(q.block, int) else 0))
    rounded = q(filled, scale=scale)[: bed.dim]
    return bed.loss(rounded).item(), bed.smoothed(weight, q, scale=scale).item()
