"""Methods that stepwell does not have, built from its public pieces: room for what comes."""

import torch
from torch import Tensor

from stepwell.methods.base import Context, Method, round_nearest
from stepwell.quantizers import Quantizer
from stepwell.rounding import pick


def learned_scale(quantizer: Quantizer, rate: float = 0.01) -> Method:
    """Scales that follow their own gradient (Esser et al., LSQ) with momentum; the Run owns both tensors."""

    def init(weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        scale = quantizer.fit(weight).scale
        return {"scale": scale * 0.8, "scale_momentum": torch.zeros_like(scale)}

    def gradient(gradient: Tensor, weight: Tensor, deployed: Tensor, context: Context) -> Tensor:
        scale, momentum = context.tensors["scale"], context.tensors["scale_momentum"]
        units, format = weight / scale, context.quantizer.format
        inside = (units > format.low) & (units < format.high)
        per_scale = (gradient * (deployed / scale - torch.where(inside, units, 0.0))).sum(1, keepdim=True)
        momentum.mul_(0.9).add_(per_scale)
        scale.sub_(rate * scale * momentum.sign())
        return gradient * inside

    return Method(quantizer, "learned scale", deploy=round_nearest, gradient=gradient, init=init)


def annealed(quantizer: Quantizer, steps: int) -> Method:
    """The forward pass moves from the latent weight to the grid within `steps` steps, as PARQ does."""

    def deploy(weight: Tensor, context: Context) -> Tensor:
        share = min(1.0, context.step / steps)
        return weight + share * (round_nearest(weight, context) - weight)

    return Method(quantizer, "annealed", deploy=deploy)


def randomized(quantizer: Quantizer) -> Method:
    """The forward pass sees randomized rounding, drawn anew at every step."""

    def deploy(weight: Tensor, context: Context) -> Tensor:
        return pick(context.quantizer.enclose(weight, context.fitted(weight)), context.uniform(weight))

    return Method(quantizer, "randomized", deploy=deploy)


def pulled(quantizer: Quantizer, share: float = 0.1) -> Method:
    """After each step a weight goes a share of the way to the grid; no curvature is read."""

    def prox(weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
        return weight + share * (round_nearest(weight, context) - weight)

    return Method(quantizer, "pulled", prox=prox, curved=False)


def pulled_by_curvature(quantizer: Quantizer) -> Method:
    """After each step a weight goes to the grid by c / (1 + c), c = lr * loss terms * Adam's second moment."""

    def prox(weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
        force = context.lr * context.loss_terms * curvature
        return weight + force / (1 + force) * (round_nearest(weight, context) - weight)

    return Method(quantizer, "pulled by curvature", prox=prox, loss_terms=1e6)


def taught(quantizer: Quantizer, strength: float = 0.1) -> Method:
    """Rounded forward pass, and a pull towards the weights that training began with, kept among the method's own tensors."""

    def init(weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        return {"teacher": weight.clone()}

    def push(weight: Tensor, curvature: Tensor, context: Context) -> Tensor:
        return strength * (weight - context.tensors["teacher"])

    return Method(quantizer, "taught", deploy=round_nearest, push=push, init=init, loss_terms=1)


def everything(quantizer: Quantizer) -> dict[str, Method]:
    """Return all of them by name."""
    made = [
        learned_scale(quantizer),
        annealed(quantizer, 4),
        randomized(quantizer),
        pulled(quantizer),
        pulled_by_curvature(quantizer),
        taught(quantizer),
    ]
    return {method.name: method for method in made}
