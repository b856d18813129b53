"""Several methods on several grids at equal budget: one trained network per seed, then the same batches for everyone.

Full precision gets the same extra steps as every method, and RTN rounds that longer-trained network. Each method's learning rate is
chosen from the same few on validation images; test images are only reported.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from stepwell.methods.base import Method
from stepwell.ptq import rtn
from stepwell.quantizers import Encoded, Quantizer
from stepwell.rounding import stochastic
from stepwell.run.attach import attach
from stepwell.run.notices import SaturationWarning, StrengthWarning
from stepwell.scales import Rule
from stepwell.train.data import Digits, Images, batches
from stepwell.train.loop import Score, evaluate, fit
from stepwell.train.models import mlp

FULL_PRECISION = "full precision"
FLOAT_BITS = 32


@dataclass(frozen=True)
class Arm:
    """One way to reach a grid.

    Args:
        name: as the tables call it.
        method: makes the training method from a quantizer and the loss terms per step; None: train in full precision, round at the end.
        rule: replaces the quantizer's scale rule.
    """

    name: str
    method: Callable[[Quantizer, int], Method] | None = None
    rule: Rule | None = None


@dataclass(frozen=True)
class Comparison:
    """All that determines a comparison; steps count optimizer steps, `grids` are bits and quantizer."""

    widths: tuple[int, ...]
    batch: int
    base_steps: int
    base_lr: float
    steps: int
    lrs: tuple[float, ...]
    grids: tuple[tuple[int, Quantizer], ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    draws: int
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    noise: float = 0.3


class Trial(NamedTuple):
    """One trained and rounded network: scores on validation images (nearest) and on test images (nearest, randomized, latent weights).

    `beyond_bound`: whether the run said that its penalty exceeds the stability bound.
    """

    arm: str
    bits: int
    lr: float
    seed: int
    validation: Score
    nearest: Score
    randomized: Score
    latent: Score
    beyond_bound: bool = False


class Network(NamedTuple):
    """What a trial leaves behind: the latent weights, the encoded ones, the model holding the encoded ones, and what its run said."""

    model: nn.Module
    latent: dict[str, Tensor]
    encoded: dict[str, Encoded]
    beyond_bound: bool = False


def count_fits(config: Comparison) -> int:
    """Return how many networks `compare` trains."""
    trained = sum(arm.method is not None for arm in config.arms)
    return len(config.seeds) * (1 + len(config.lrs) * (1 + trained * len(config.grids)))


def compare(config: Comparison, digits: Digits, fitted: Callable[[str], None]) -> Iterator[tuple[Trial, Network]]:
    """Yield every trial: seeds, then learning rates, then grids, then methods; full precision comes with bits = 32.

    Args:
        config: what to compare.
        digits: the data.
        fitted: called after each training run with a few words about it.
    """
    for seed in config.seeds:
        base = mlp(config.widths, seed=seed)
        _train(config, base, _batches(config, digits, seed, config.base_steps), lr=config.base_lr)
        later = _batches(config, digits, _later(seed), config.steps)
        fitted(f"seed {seed}, full precision")
        for lr in config.lrs:
            control = copy.deepcopy(base)
            _train(config, control, later, lr=lr)
            fitted(f"seed {seed}, full precision, longer")
            score = evaluate(control, digits.test)
            validation = evaluate(control, digits.validation)
            yield Trial(FULL_PRECISION, FLOAT_BITS, lr, seed, validation, score, score, score), Network(control, {}, {})
            for bits, quantizer in config.grids:
                for arm in config.arms:
                    q = quantizer if arm.rule is None else replace(quantizer, rule=arm.rule)
                    if arm.method is None:
                        network = _rounded(control, q)
                    else:
                        network = _trained(config, base, later, method=arm.method(q, config.batch), lr=lr)
                        fitted(f"seed {seed}, {bits} bits, {arm.name}")
                    found = scores(network, q, digits, draws=config.draws)
                    yield Trial(arm.name, bits, lr, seed, *found, beyond_bound=network.beyond_bound), network


def scores(network: Network, quantizer: Quantizer, digits: Digits, *, draws: int) -> tuple[Score, Score, Score, Score]:
    """Return a network's scores: validation and test under nearest rounding, test under randomized rounding, test with latent weights.

    Args:
        network: its model holds the encoded weights, before and after.
        quantizer: the grid on which the latent weights are rounded at random.
        digits: the data.
        draws: randomized roundings to average over; the same random numbers for every network.
    """
    model = network.model
    validation, nearest = evaluate(model, digits.validation), evaluate(model, digits.test)
    drawn = []
    for draw in range(draws):
        rounding = stochastic(torch.Generator().manual_seed(draw))
        write_(model, {name: quantizer(weight, rounding=rounding) for name, weight in network.latent.items()})
        drawn.append(evaluate(model, digits.test))
    write_(model, network.latent)
    latent = evaluate(model, digits.test)
    write_(model, {name: encoded.decode() for name, encoded in network.encoded.items()})
    randomized = Score(sum(score.loss for score in drawn) / draws, sum(score.accuracy for score in drawn) / draws)
    return validation, nearest, randomized, latent


def write_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into the model's parameters of these names."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)


def _batches(config: Comparison, digits: Digits, seed: int, steps: int) -> list[Images]:
    """Return all batches of a training run, so that several runs see the same."""
    return list(batches(digits, config.batch, steps=steps, seed=seed, noise=config.noise))


def _train(config: Comparison, model: nn.Module, data: Sequence[Images], *, lr: float) -> None:
    """Train in full precision, the learning rate falling linearly to zero."""
    optimizer, scheduler = _optimizer(config, model, lr, len(data))
    fit(model, data, optimizer=optimizer, scheduler=scheduler)


def _trained(config: Comparison, base: nn.Module, data: Sequence[Images], *, method: Method, lr: float) -> Network:
    """Train a copy of the base with a method attached, on the batches that full precision saw."""
    model = copy.deepcopy(base)
    optimizer, scheduler = _optimizer(config, model, lr, len(data))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = attach(model, method, optimizer, compile=False)  # a network this small would not pay for it
        fit(model, data, optimizer=optimizer, scheduler=scheduler)
    for one in said:  # a runtime's grid is what it is, and every run would say so again; a penalty's strength goes into the record
        if not issubclass(one.category, SaturationWarning | StrengthWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    with run.latent():
        latent = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    encoded = run.finalize()
    beyond = any(issubclass(one.category, StrengthWarning) for one in said)
    return Network(model, {name: latent[name] for name in encoded}, encoded, beyond)


def _rounded(control: nn.Module, quantizer: Quantizer) -> Network:
    """Round a copy of the longer-trained full-precision network to nearest."""
    model = copy.deepcopy(control)
    encoded = rtn(model, quantizer)
    return Network(model, {name: control.get_parameter(name).detach().clone() for name in encoded}, encoded)


def _optimizer(config: Comparison, model: nn.Module, lr: float, steps: int) -> tuple[AdamW, LambdaLR]:
    """Return AdamW and a schedule that falls linearly from `lr` to zero."""
    optimizer = AdamW(model.parameters(), lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


def _later(seed: int) -> int:
    """Return the seed of the batches after the base: the same for every method, other than the base's."""
    return 1_000_000 + seed
