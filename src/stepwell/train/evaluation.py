"""Evaluation: a language model's loss on held-out text as it is in float, rounded to nearest, and rounded at random."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepwell.quantizers import Encoded
from stepwell.rounding import stochastic
from stepwell.run.attach import Run
from stepwell.selection import select
from stepwell.train.language import row_losses
from stepwell.train.ranks import Ranks, put_, whole
from stepwell.train.recipe import Recipe
from stepwell.train.tokens import Part


class Losses(NamedTuple):
    """Held-out losses in nats per token.

    Attributes:
        latent: of the weights that the optimizer moves, in float.
        nearest: of what is shipped: those weights on the grid.
        randomized: mean over draws of randomized rounding with the same scales; NaN where none was asked for.
    """

    latent: float
    nearest: float
    randomized: float


def evaluate(model: nn.Module, run: Run | None, recipe: Recipe, held: Part, ranks: Ranks, *, draws: int = 0) -> Losses:
    """Return the losses on the first held-out sequences; weights and mode of the model are what they were. Every process calls it.

    Args:
        model: what trains.
        run: the method on it; None rounds a model in full precision to the recipe's grid.
        recipe: the grid, how many rows, their length, the precision.
        held: held-out tokens.
        ranks: the rows are shared out over all processes.
        draws: randomized roundings, by seeds 0, 1, ..: the same random numbers for every model.
    """
    training = model.training
    model.eval()
    try:
        encoded = encode(model, run, recipe) if draws or run is None else {}
        with nullcontext() if run is None else run.latent():
            latent = _loss(model, recipe, held, ranks)
            drawn = []
            for draw in range(draws):
                with holding(model, _drawn(model, encoded, draw)):
                    drawn.append(_loss(model, recipe, held, ranks))
            if run is None:
                with holding(model, {name: one.decode() for name, one in encoded.items()}):
                    nearest = _loss(model, recipe, held, ranks)
        if run is not None:
            with run.deployed():
                nearest = _loss(model, recipe, held, ranks)
    finally:
        model.train(training)
    return Losses(latent, nearest, sum(drawn) / draws if draws else float("nan"))


def encode(model: nn.Module, run: Run | None, recipe: Recipe) -> dict[str, Encoded]:
    """Return what would be shipped now, by parameter name; without a run, the weights rounded to the recipe's grid."""
    if run is not None:
        return run.encoded()
    chosen = select(model, recipe.quantizer, skip=recipe.skip).chosen
    grids = {row.name: recipe.quantizer if row.axis is None else replace(recipe.quantizer, axis=row.axis) for row in chosen}
    return {row.name: grids[row.name].encode(whole(row.parameter.detach())) for row in chosen}


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold other weights in the model while the block runs; each is the whole of its parameter."""
    with torch.no_grad():
        kept = {name: model.get_parameter(name).detach().clone() for name in weights}
        try:
            for name, weight in weights.items():
                put_(model.get_parameter(name), weight)
            yield
        finally:
            for name, weight in kept.items():
                model.get_parameter(name).copy_(weight)


def _drawn(model: nn.Module, encoded: Mapping[str, Encoded], seed: int) -> dict[str, Tensor]:
    """Return one draw of randomized rounding, with the scales that are shipped."""
    weights = {}
    for number, (name, one) in enumerate(encoded.items()):
        weight = whole(model.get_parameter(name).detach())
        generator = torch.Generator(weight.device).manual_seed(seed * len(encoded) + number)
        scale = None if one.quantizer.format.levels == "affine" else one.scales
        weights[name] = one.quantizer(weight, scale=scale, rounding=stochastic(generator))
    return weights


@torch.no_grad()
def _loss(model: nn.Module, recipe: Recipe, held: Part, ranks: Ranks) -> float:
    """Return the mean loss per token; every process runs the model equally often, as sharding needs it."""
    count = min(recipe.evaluate_rows, held.sequences(recipe.length))
    share = -(-count // ranks.size)
    numbers = [ranks.rank * share + place for place in range(share)]
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for first in range(0, share, recipe.micro):
        some = numbers[first : first + recipe.micro]
        rows = held.rows([number if number < count else 0 for number in some], recipe.length).to(ranks.device)
        real = torch.tensor([number < count for number in some], device=ranks.device)
        total += (row_losses(model, rows, recipe.precision).double() * real).sum()
    return float(ranks.total(total)) / (count * recipe.length)
