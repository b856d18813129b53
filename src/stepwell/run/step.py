"""Stepper: what happens around one optimizer step, in order, and how it is repaired when the step fails."""

import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepwell import randomness
from stepwell.methods.base import Context
from stepwell.run import passes
from stepwell.run.check import EXACT
from stepwell.run.managed import Managed, local
from stepwell.run.phases import Phase

Terms = Callable[[Managed, int], float]
Replaced = tuple[tuple[Any, ...], dict[str, Any]]


class Hooks(NamedTuple):
    """What the stepper asks the Run: adopt outside writes, and count loss terms."""

    settle: Callable[[], None]
    terms: Terms


class Stepper:
    """Moves managed parameters between their two faces: latent while the optimizer steps, deployed in between."""

    def __init__(self, managed: list[Managed], *, start: int, seed: int, refit: int, compiled: bool | None) -> None:
        """Keep the settings; `begin_run` touches the parameters."""
        self._managed, self._start, self._seed, self._refit = managed, start, seed, refit
        optimizers = dict.fromkeys(one.optimizer for one in managed if one.optimizer is not None)
        self.steps: dict[Optimizer, int] = dict.fromkeys(optimizers, 0)
        self._phases = {optimizer: Phase() for optimizer in optimizers}
        self._active: dict[Optimizer, list[tuple[Managed, float | None, float]]] = {}
        device = managed[0].weight.device
        self.compiled = passes.compile_pays(sum(one.weight.numel() for one in managed), device) if compiled is None else compiled
        self._insist = compiled is True
        self._whole = passes.whole({})

    def begin_run(self) -> None:
        """Create the methods' tensors and, if the method starts now, show the first deployed weights."""
        for one in self._managed:
            if one.method.init is not None:
                one.tensors = one.method.init(one.blocks(one.weight), one.grid)
            one.refit()
            if not self._start:
                self.begin(one)

    def begin(self, one: Managed) -> None:
        """Take the parameter's value as its latent weight and deploy it."""
        if one.method.deploy is not None:
            one.latent = one.weight.clone(memory_format=torch.preserve_format)
            self.show(one)

    def started(self, one: Managed) -> bool:
        """Whether the method has begun for this parameter; a frozen one begins with the others."""
        steps = max(self.steps.values(), default=0) if one.optimizer is None else self.steps[one.optimizer]
        return steps >= self._start

    def jump(self, optimizer: Optimizer, step: int) -> None:
        """Go to a step count that was loaded; methods that start later are not on yet, others are."""
        self.steps[optimizer] = step
        for one in self._managed:
            if one.optimizer is optimizer and not self.started(one):
                one.latent = None
            elif one.latent is None and self.started(one):
                self.begin(one)

    # One step.

    def before(self, optimizer: Optimizer, call: Replaced, frame: FrameType, hooks: Hooks) -> Replaced | None:
        """Open a step; a closure is wrapped so that it runs the forward pass on deployed weights.

        `call` is what `optimizer.step` was called with, `frame` the frame it runs in.
        """
        args, kwargs = call
        if optimizer not in self._phases:
            return None
        self.repair()
        if not self._phases[optimizer].opens(frame):
            return None
        try:
            hooks.settle()
            if _reads_state(optimizer) or _overflowed(optimizer):
                return None
            closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
            if closure is None:
                self._open(optimizer, hooks.terms)
                return None
        except BaseException:
            self._phases[optimizer].forget()
            self._active.pop(optimizer, None)
            raise
        shown = self._shown(optimizer, closure, hooks.terms)
        return ((args[0], shown, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": shown})

    @torch.no_grad()
    def after(self, optimizer: Optimizer, frame: FrameType) -> None:
        """Close a step: take the optimizer's result as the latent weight and deploy it."""
        if optimizer not in self._phases or not self._phases[optimizer].closes(frame):
            return
        active = self._active.pop(optimizer, None)
        if active is None:  # a skipped step, or one that only created optimizer state
            return
        self.steps[optimizer] += 1
        for one, _, terms in active:
            context = self._context(one, terms)
            self._finish(one, context)
            one.note()
        if self.steps[optimizer] == self._start:
            for one in self._managed:
                if one.latent is None and self.started(one):
                    self.begin(one)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def repair(self) -> None:
        """Undo what a step that ended in an exception left behind: managed parameters go back to before it."""
        for optimizer, phase in self._phases.items():
            if not phase.stale:
                continue
            phase.forget()
            for one, stepped, terms in self._active.pop(optimizer, []):
                if stepped is not None and stepped == _stepped(one):  # the optimizer never used the push
                    if one.latent is not None:
                        one.weight.copy_(one.latent)
                    self._push(one, terms, undo=True)
                if one.latent is not None:
                    self.show(one)

    def show(self, one: Managed) -> None:
        """Write what the forward pass shall see into the parameter."""
        assert one.latent is not None
        self._show_into(one, one.weight)
        one.note()

    def shows(self, one: Managed) -> bool:
        """Whether the parameter's value is what its latent weight deploys to."""
        expected = torch.empty_like(one.weight)
        self._show_into(one, expected)
        return torch.equal(expected, one.weight)

    def adopt(self, one: Managed) -> None:
        """Make the parameter's value its latent weight; it may have moved to another device."""
        assert one.latent is not None
        one.latent = one.weight.clone(memory_format=torch.preserve_format)
        one.tensors = {key: tensor.to(one.latent.device) for key, tensor in one.tensors.items()}
        one.refit()
        self.show(one)

    def on_grid(self, one: Managed) -> bool:
        """Whether the parameter holds its nearest grid weights between steps."""
        return one.latent is not None and one.method.deploys_nearest

    @property
    def penalty(self) -> str:
        """How the methods' penalties reach the weights."""
        exact = {isinstance(one.optimizer, EXACT) for one in self._managed if one.method.push is not None}
        if len(exact) == 2:
            return "in the first moment where there is one"
        return "in the first moment" if True in exact else "after the step"

    @torch.no_grad()
    def _open(self, optimizer: Optimizer, terms: Terms) -> None:
        """Hand the optimizer latent weights, the method's gradients and a first moment that holds the penalty."""
        begun = self.steps[optimizer] >= self._start
        mine = [one for one in self._managed if begun and one.optimizer is optimizer and one.parameter.grad is not None]
        counted = [(one, terms(one, self.steps[optimizer])) for one in mine]  # may raise: nothing has changed yet
        self._active[optimizer] = []
        for one, count in counted:
            if one.method.gradient is not None:
                self._regrade(one, count)
            if one.latent is not None:
                one.weight.copy_(one.latent)
            pushed = _stepped(one) if self._push(one, count) else None
            self._active[optimizer].append((one, pushed, count))

    def _finish(self, one: Managed, context: Context) -> None:
        """Do what follows the optimizer's update of one parameter."""
        if one.method.push is not None and not isinstance(one.optimizer, EXACT):
            self._run(passes.descend, one, context, [one.weight, self._curvature(one)])
        if one.method.prox is not None:
            corrected = context._replace(loss_terms=context.loss_terms * self._correction(one))
            self._run(passes.prox, one, corrected, [one.weight, self._curvature(one)])
        assert one.optimizer is not None
        if one.fit is not None and self.steps[one.optimizer] % self._refit == 0:
            one.fit = one.grid.fit(one.blocks(one.weight))
            context = context._replace(fit=one.fit)
        if one.latent is not None:
            self._run(passes.deploy, one, context, [one.weight, one.latent])

    def _regrade(self, one: Managed, terms: float) -> None:
        grad = local(one.parameter.grad.detach())  # type: ignore[union-attr]
        weight = one.weight if one.latent is None else one.latent
        self._run(passes.gradient, one, self._context(one, terms, weight), [grad, weight, one.weight])

    def _push(self, one: Managed, terms: float, *, undo: bool = False) -> bool:
        """Add the penalty's gradient to the first moment; False where there is none yet, or the optimizer has none."""
        if one.method.push is None or not isinstance(one.optimizer, EXACT):
            return False
        state: Any = one.optimizer.state.get(one.parameter)
        if not state or "exp_avg" not in state:
            return False
        beta = float(one.group["betas"][0])
        factor = (1 - beta) / beta * (-1 if undo else 1)
        context = self._context(one, terms * self._correction(one))
        tensors = [one.weight, local(state["exp_avg"]), self._curvature(one)]
        self._run(passes.push, one, context, tensors, torch.tensor(factor, dtype=torch.float64))
        return True

    def _correction(self, one: Managed) -> float:
        """Return the bias correction of Adam's second moment, 1 for curvature that the caller gives or nobody reads."""
        if one.method.curvature is not None or not one.method.curved:
            return 1.0
        assert one.optimizer is not None
        return float(1 / (1 - float(one.group["betas"][1]) ** float(one.optimizer.state[one.parameter]["step"])))

    def _curvature(self, one: Managed) -> Tensor:
        """Return the curvature, of the parameter's local shape; Adam's second moment is left uncorrected, to save a pass."""
        given = one.method.curvature
        if given is not None:
            return local(given(one.name) if callable(given) else given[one.name]).to(one.weight)
        assert one.optimizer is not None
        if not one.method.curved:
            return one.weight
        return local(one.optimizer.state[one.parameter]["exp_avg_sq"])

    def _context(self, one: Managed, terms: float, source: Tensor | None = None) -> Context:
        """Return what the method may know; `source` is the weight to fit scales to, the parameter's own value by default."""
        step = 0 if one.optimizer is None else self.steps[one.optimizer]
        return Context(
            quantizer=one.grid,
            step=step,
            lr=torch.as_tensor(one.group.get("lr", 0.0), dtype=torch.float64),
            loss_terms=torch.tensor(terms, dtype=torch.float64),
            fit=one.held_fit(one.blocks(one.weight if source is None else source)),
            tensors=one.tensors,
            key=randomness.stream(self._seed, step, one.name),
            offset=one.offset,
        )

    @torch.no_grad()
    def _show_into(self, one: Managed, into: Tensor) -> None:
        assert one.latent is not None
        self._run(passes.show, one, self._context(one, 1.0, one.latent), [into, one.latent])

    def _shown(self, optimizer: Optimizer, closure: Callable[[], Any], terms: Terms) -> Callable[[], Any]:
        """Return the closure with deployed weights inside; what it leaves behind is a step that is open."""

        def run() -> Any:
            reopened = self._active.get(optimizer)
            for one, _, _ in reopened or []:
                if one.latent is not None:
                    one.latent.copy_(one.weight)
                    self.show(one)
            result = closure()
            if reopened is None:
                self._open(optimizer, terms)
            else:
                for one, _, count in reopened:
                    if one.method.gradient is not None:
                        self._regrade(one, count)
                    if one.latent is not None:
                        one.weight.copy_(one.latent)
            return result

        return run

    def _run(self, work: passes.Pass, one: Managed, context: Context, tensors: list[Tensor], *scalars: Tensor) -> None:
        """Run a pass on the chosen path; the automatic path falls back to eager where compilation fails."""
        if not one.weight.numel():  # an empty shard
            return
        if self.compiled:
            try:
                self._whole(work, one, context, tensors, *scalars)
                return
            except Exception as error:
                if self._insist:
                    raise
                self.compiled = False
                warnings.warn(f"torch.compile failed ({type(error).__name__}: {error}); the run goes on with the eager path.", stacklevel=2)
        passes.piecewise(work, one, context, tensors, *scalars)


def _reads_state(optimizer: Optimizer) -> bool:
    """Whether this is torch.distributed.checkpoint's step that only creates state: rate 0, zero gradients, no state yet."""
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    return not any(bool(local(gradient).any()) for gradient in gradients)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler tells a fused optimizer to leave everything alone."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _stepped(one: Managed) -> float:
    """Return the optimizer's own step count of one parameter."""
    assert one.optimizer is not None
    return float(one.optimizer.state[one.parameter]["step"])
