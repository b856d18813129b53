"""Calibrate: how many loss terms a step averages, measured on the loss instead of counted by the user.

Source: section 3 of Kwun et al., "LOTION" (arXiv:2510.08757) for what is measured. The penalty says that randomized rounding costs
N / 2 sum v sigma^2, with v the mean squared gradient of a step, sigma^2 the variance of rounding and N the loss terms of a step; the cost
itself is the mean of L(RR(w)) over draws, so N follows. The first-order part g (RR(w) - w) is zero in the mean and noise in a draw: it is
subtracted from each. Draws go half the way and count four times: at two bits the whole way leads to where the loss levels off (a language
model's N of 1024 was measured as 690 the whole way and as 1180 half the way).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepwell.methods.fisher import FISHER, SEEN
from stepwell.modes import evaluating
from stepwell.rounding import Bracket, pick, variance
from stepwell.run import moments
from stepwell.run.managed import Managed, groups_of, like, local, whole_tensor, wide
from stepwell.run.rounds import Watcher
from stepwell.run.terms import LossTerms, Measured, counts

BatchLoss = Callable[[nn.Module, Any], Tensor]
REACH = 0.5  # how much of the way to a draw of randomized rounding the loss is measured at


@dataclass(frozen=True)
class Calibration:
    """What a calibration measured.

    Attributes:
        loss_terms: the count that makes the penalty cost what randomized rounding costs.
        increase: what randomized rounding costs to second order, in the loss's unit; around the weight clamped to the grid.
        stderr: standard error of that mean over draws; the batches are fixed.
        penalty: 1/2 sum v sigma^2 of the same weights.
    """

    loss_terms: float
    increase: float
    stderr: float
    penalty: float


class Counted(Protocol):
    """What a calibration asks of a Run."""

    model: nn.Module
    loss_terms: LossTerms

    @property
    def steps(self) -> int:
        """Optimizer steps done."""

    def on_step(self, watcher: Watcher) -> RemovableHandle:
        """Call a function after every step."""


def calibrate(
    run: Counted, managed: list[Managed], loss: BatchLoss, batches: Iterable[Any], *, draws: int, every: int | None
) -> Calibration:
    """Measure, tell the Run, and measure again whenever `every` steps are done; see `Run.calibrate`."""
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"`every` must be a whole number of steps, 1 or more, or None: got {every!r}.")
    kept = batches if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable) else list(batches)
    found = measure(run.model, managed, loss, kept, draws=draws, seed=run.steps)
    run.loss_terms = Measured(found.loss_terms)

    def again(last: bool) -> None:
        if last or every is None or run.steps % every:
            return
        try:
            run.loss_terms = Measured(measure(run.model, managed, loss, kept, draws=draws, seed=run.steps).loss_terms)
        except RuntimeError as error:
            warnings.warn(f"calibration at step {run.steps}: {error} The count of before stays.", stacklevel=2)

    if every is not None:
        run.on_step(again)
    return found


def measure(model: nn.Module, managed: list[Managed], loss: BatchLoss, batches: Iterable[Any], *, draws: int, seed: int) -> Calibration:
    """Return the loss terms that the loss itself shows; the weights are left as they were.

    Raises:
        TypeError, ValueError: batches or draws that are none.
        RuntimeError: no method that counts loss terms; an increase that is not positive by two standard errors.
    """
    mine = [one for one in managed if one.begun and counts(one.method) and one.parameter.requires_grad]
    kept = _checked(mine, batches, draws)
    sources = {one: one.source.clone() for one in mine}
    with evaluating(model), _restored(mine):
        for one in mine:
            one.weight.copy_(_rounded(one, sources[one], None))
        base, mean, square = _gradients(model, mine, loss, kept)
        penalty = sum(_penalty(one, sources[one], square[one]) for one in mine)
        found = []
        for draw in range(draws):
            generator = torch.Generator(mine[0].weight.device).manual_seed(seed + draw)
            linear = 0.0
            for one in mine:
                clamped = _rounded(one, sources[one], None)
                moved = (_rounded(one, sources[one], generator) - clamped) * REACH
                linear += _total(one, mean[one] * moved)
                one.weight.copy_(clamped + moved)
            found.append((_loss(model, loss, kept) - base - linear) / REACH**2)
    increases = torch.tensor(found, dtype=torch.float64)
    device = mine[0].weight.device
    increase, penalty = _everywhere(float(increases.mean()), device), _everywhere(penalty, device)
    stderr = float(increases.std()) / math.sqrt(draws)
    if not (math.isfinite(increase) and increase > 2 * stderr and penalty > 0):
        raise RuntimeError(
            f"`loss` does not rise measurably under randomized rounding: by {increase:.3g} with a standard error of {stderr:.2g}; the "
            f"penalty is {penalty:.3g} per loss term. Give more batches or draws, or set `run.loss_terms` to batch times sequence."
        )
    return Calibration(increase / penalty, increase, stderr, penalty)


def _checked(mine: list[Managed], batches: Iterable[Any], draws: int) -> list[Any]:
    if not mine:
        raise RuntimeError("no method of this run counts loss terms, so there is nothing to calibrate. `lotion(q)` and `prox(q, ..)` do.")
    if any(groups_of(one.parameter) for one in mine):  # FSDP2 makes gradients of shards in `backward` alone, which would touch the user's
        raise RuntimeError(
            "the parameters are sharded, and a calibration needs them whole. Set `run.loss_terms` to the loss terms that a step averages "
            "over all ranks, or calibrate on one process and set what it found."
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ValueError(f"`draws` must be a whole number, 2 or more: got {draws!r}.")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of batches: got a {type(batches).__name__}. Write [batch] for a single one.")
    kept = list(batches)
    if not kept:
        raise ValueError("`batches` must hold data: got no batch.")
    return kept


@contextmanager
def _restored(mine: list[Managed]) -> Iterator[None]:
    saved = [(one, one.weight.clone()) for one in mine]
    try:
        yield
    finally:
        for one, weight in saved:
            one.weight.copy_(weight)
            one.note()
        torch.clear_autocast_cache()


@torch.no_grad()
def _rounded(one: Managed, source: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return one draw of a weight rounded at random, or, without a generator, the weight clamped to the grid: their mean."""
    bracket = _bracket(one, source)
    drawn = bracket.x if generator is None else pick(bracket, torch.empty_like(bracket.x).uniform_(generator=generator))
    return one.unblock(drawn).to(one.weight)


def _gradients(
    model: nn.Module, mine: list[Managed], loss: BatchLoss, batches: list[Any]
) -> tuple[float, dict[Managed, Tensor], dict[Managed, Tensor]]:
    """Return the mean loss, and the mean gradient and the mean square of a batch's gradient by parameter, local."""
    total, mean = 0.0, {one: torch.zeros_like(one.weight) for one in mine}
    square = {one: torch.zeros_like(one.weight) for one in mine}
    for batch in batches:
        with torch.enable_grad():
            value = loss(model, batch)
            gradients = torch.autograd.grad(value, [one.parameter for one in mine], allow_unused=True)
        total += float(value.detach()) / len(batches)
        for one, gradient in zip(mine, gradients, strict=True):
            if gradient is not None:
                mean[one].add_(local(gradient), alpha=1 / len(batches))
                square[one].addcmul_(local(gradient), local(gradient), value=1 / len(batches))
    return total, mean, square


def _bracket(one: Managed, source: Tensor) -> Bracket:
    """Return the neighbours of a local weight, as blocks."""
    blocks, fit = wide(one.blocks(source)), one.held_fit(source)
    return one.grid.enclose(blocks, one.grid.fit(blocks) if fit is None else fit)


def _penalty(one: Managed, source: Tensor, square: Tensor) -> float:
    """Return 1/2 sum v sigma^2, v the Run's own or the optimizer's mean squared gradient where there is one, else that of the batches."""
    if FISHER in one.tensors and bool((one.tensors[SEEN] > 0).all()):
        square = one.unblock(one.tensors[FISHER])
    elif moments.reads_moments(one.method) and moments.step_of(one) is not None:
        square = moments.second(one) * moments.bias(one)
    return _total(one, square * one.unblock(variance(_bracket(one, source)))) / 2


def _total(one: Managed, tensor: Tensor) -> float:
    """Return the sum over the whole parameter."""
    return float(whole_tensor(like(one.parameter, tensor).sum()))


@torch.no_grad()
def _loss(model: nn.Module, loss: BatchLoss, batches: list[Any]) -> float:
    return sum(float(loss(model, batch)) for batch in batches) / len(batches)


def _everywhere(value: float, device: torch.device) -> float:
    """Return the mean over all ranks, which see different batches."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    shared = torch.tensor(value, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(shared)
    return float(shared) / torch.distributed.get_world_size()
