"""Stage: a model while a probe moves its weights; it counts passes, checks the loss, and leaves the model exactly as it was.

Every probe takes `loss`, a function of the model that evaluates it on the caller's data and returns one number as a tensor. It is called
in evaluation mode (dropout off, BatchNorm statistics frozen) and must give the same number for the same weights. One copy of the moved
weights is held; gradients are consumed tensor by tensor. What the loss itself needs (activations, and the graph where a gradient is asked
for) comes on top. Source for the re-estimated statistics: Ioffe and Szegedy, "Batch Normalization" (arXiv:1502.03167), section 3.1.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwell.probes.points import Move, dot, working

Loss = Callable[[nn.Module], Tensor]
AGREE = 1e-5  # relative: two evaluations on a GPU differ by the order of their sums, dropout by far more


class Cost(NamedTuple):
    """Passes over the caller's data; a forward pass is one call of `loss`, a backward pass one gradient of it."""

    forward: int
    backward: int = 0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.forward + other.forward, self.backward + other.backward)


class Stage:
    """Moves the named weights of a model and evaluates it there; made by `staged`."""

    def __init__(self, model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter]) -> None:
        """Copy the weights; `staged` restores them."""
        self._model, self._loss, self._parameters = model, loss, parameters
        self._copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._forward = self._backward = 0
        self.start = math.nan

    @property
    def base(self) -> dict[str, Tensor]:
        """The weights that the model was given with."""
        return self._copies

    @property
    def elements(self) -> int:
        """How many weights are moved."""
        return sum(copy.numel() for copy in self._copies.values())

    @property
    def cost(self) -> Cost:
        """Passes so far."""
        return Cost(self._forward, self._backward)

    def put(self, point: Move) -> None:
        """Write `point(name, base)` into every weight, one tensor at a time."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(point(name, working(self._copies[name])))
        torch.clear_autocast_cache()

    def held(self, name: str) -> Tensor:
        """Return what the model holds now."""
        return working(self._parameters[name])

    def loss(self) -> float:
        """Return the loss where the weights are now; infinite where it is not a number."""
        with torch.no_grad():
            return _number(self._call(self._loss))

    def other(self, loss: Loss) -> float:
        """Return another loss, for instance on held-out data, where the weights are now."""
        with torch.no_grad():
            return _number(self._call(loss))

    def gradient(self, loss: Loss | None = None) -> tuple[float, dict[str, Tensor]]:
        """Return a loss, by default the probe's own, and its gradient by name where the weights are now; `.grad` is not touched."""
        found: dict[str, Tensor] = {}
        value = self.gradients(found.__setitem__, loss)
        return value, {name: found[name] for name in self._parameters}

    def gradients(self, take: Callable[[str, Tensor], object], loss: Loss | None = None) -> float:
        """Return a loss and hand its gradient over, `take(name, gradient)`, tensor by tensor while it is differentiated.

        What `take` does not keep is gone before the next one is there, so that a probe which only needs sums holds no copy of the weights
        for them. `.grad` is not touched.
        """
        missing = dict.fromkeys(self._parameters)

        def handed(name: str, gradient: Tensor) -> Tensor:
            del missing[name]
            take(name, working(gradient))
            return gradient.new_zeros(()).expand_as(gradient)  # what autograd returns in the end, without memory

        with self._graph(loss) as value:
            handles = [one.register_hook(partial(handed, name)) for name, one in self._parameters.items()]  # type: ignore[no-untyped-call]
            try:
                torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
                self._backward += 1
            finally:
                for handle in handles:
                    handle.remove()
        for name in missing:  # the loss does not depend on these
            take(name, torch.zeros_like(working(self._parameters[name])))
        return _number(value)

    def product(self, move: Move) -> tuple[float, float]:
        """Return the gradient's and the Hessian's products with a displacement v, g.v and v.Hv, where the weights are now."""
        with self._graph() as value:
            weights = list(self._parameters.values())
            parts = torch.autograd.grad(value, weights, allow_unused=True, create_graph=True)
            ways = [move(name, working(self._copies[name])) for name in self._parameters]
            along = sum(
                ((part * way.to(part)).sum() for part, way in zip(parts, ways, strict=True) if part is not None), value.new_zeros(())
            )
            self._backward += 1
            if not along.requires_grad:  # a loss that is linear in the weights
                return float(along), 0.0
            seconds = torch.autograd.grad(along, weights, allow_unused=True)
            self._backward += 1
        curvature = sum(dot(second, way.to(second)) for second, way in zip(seconds, ways, strict=True) if second is not None)
        return float(along.detach()), float(curvature)

    @contextmanager
    def _graph(self, loss: Loss | None = None) -> Iterator[Tensor]:
        """Evaluate a loss with a graph to the weights; inside the block it may be differentiated."""
        asked = [parameter.requires_grad for parameter in self._parameters.values()]
        try:
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                value = self._call(self._loss if loss is None else loss)
                if not value.requires_grad:
                    raise ValueError(
                        f"`loss` must be differentiable by the weights: got {value.item():g} without a graph. "
                        "Do not detach, call .item() or use no_grad inside it."
                    )
                yield value.reshape(())
        finally:
            for parameter, wanted in zip(self._parameters.values(), asked, strict=True):
                parameter.requires_grad_(wanted)

    def settled(self, on: Loss | None = None) -> float:
        """Return the loss where the weights are now, with BatchNorm statistics re-estimated for them on its data, or on another loss's.

        That is what a deployed model would have; slices keep the statistics frozen instead. Without BatchNorm it is `loss()`.
        """
        norms = batchnorms(self._model)
        if not norms:
            return self.loss()
        saved = [(norm, norm.momentum, {name: value.clone() for name, value in norm.named_buffers(recurse=False)}) for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average over all batches of the loss
                norm.training = True
            self.other(self._loss if on is None else on)
            for norm in norms:
                norm.training = False
            return self.loss()
        finally:
            for norm, momentum, buffers in saved:
                norm.momentum, norm.training = momentum, False
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)

    def evaluating(self) -> None:
        """Set evaluation mode again, after a training function that may have left it."""
        for module in self._model.modules():
            module.training = False

    def check(self) -> None:
        """Evaluate the loss twice at the weights as given, and refuse one that no probe can work with."""
        first, second = self._first(), self.loss()
        if not abs(first - second) <= AGREE * max(abs(first), abs(second)):
            raise ValueError(
                f"`loss` must give the same number for the same weights: got {first:g}, then {second:g}. Dropout left on "
                "(functional.dropout without `training=self.training`) or batches drawn anew at every call do this."
            )
        self.start = first

    def _first(self) -> float:
        """Return the loss at the weights as given."""
        with torch.no_grad():
            value = self._call(self._loss)
        training = [name or type(module).__name__ for name, module in self._model.named_modules() if module.training]
        if training:
            raise ValueError(
                f"`loss` switches the model to training mode ({', '.join(training[:3])}), where dropout is on and BatchNorm follows the "
                "batch. Leave the mode alone inside it: probes set evaluation mode and put back what was there."
            )
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"`loss` must be finite at the model's own weights: got {number}. Is the data empty, or a weight too large?")
        return number

    def _call(self, loss: Loss) -> Tensor:
        value = loss(self._model)
        self._forward += 1
        if not isinstance(value, Tensor):
            raise TypeError(f"`loss` must return a tensor with one element: got {type(value).__name__}. Do not call .item() inside it.")
        if value.numel() != 1:
            raise ValueError(f"`loss` must return a scalar: got shape {tuple(value.shape)}. Take the mean over the batch.")
        return value

    def _restore(self) -> None:
        self.put(lambda name, base: self._copies[name])


@contextmanager
def staged(model: nn.Module, loss: Loss, names: Iterable[str]) -> Iterator[Stage]:
    """Let a probe move the named weights of a model, and put back weights, modes and buffers whatever happens.

    Raises:
        TypeError: `loss` is not callable or returns no tensor.
        ValueError: `loss` is not scalar, not finite or not deterministic.
    """
    with unchecked(model, loss, names) as stage:
        stage.check()
        yield stage


@contextmanager
def unchecked(model: nn.Module, loss: Loss, names: Iterable[str]) -> Iterator[Stage]:
    """Do as `staged` with a loss that has been checked before, which saves two forward passes; `start` is not known."""
    if not callable(loss):
        raise TypeError(f"`loss` must be a function of the model: got {type(loss).__name__}. Write `lambda model: criterion(model(x), y)`.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    stage = Stage(model, loss, {name: parameters[name] for name in names})
    try:
        stage.evaluating()
        yield stage
    finally:
        stage._restore()
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers whose statistics can be re-estimated; one that keeps none always follows its batch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def check_tolerance(tolerance: float) -> None:
    """Raise unless a loss tolerance is a positive number."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(f"`tolerance` must be a positive number, in units of the loss: got {tolerance!r}. A common choice is 0.1 nat.")


def _number(value: Tensor) -> float:
    """Return a loss as a float; far from the start it may overflow, which counts as infinitely bad."""
    number = float(value.detach())
    return math.inf if math.isnan(number) else number
