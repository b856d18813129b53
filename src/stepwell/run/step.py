"""Stepper: what happens around one optimizer step, in order, and how it is repaired when the step fails."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepwell.run import fused, moments, onepass, passes, sharding
from stepwell.run.managed import SCALE, Managed, local, wide
from stepwell.run.opened import Hooks, Opened, Replaced, Terms, remember
from stepwell.run.phases import Phase, creates_state, overflowed
from stepwell.run.told import Teller, Told


class Stepper:
    """Moves managed parameters between their two faces: latent while the optimizer steps, deployed in between."""

    def __init__(self, managed: list[Managed], *, start: int, seed: int, refit: int, compiled: bool | None) -> None:
        """Keep the settings; `begin_run` touches the parameters."""
        self._managed, self._start, self._refit = managed, start, refit
        optimizers = dict.fromkeys(one.optimizer for one in managed if one.optimizer is not None)
        self.steps: dict[Optimizer, int] = dict.fromkeys(optimizers, 0)
        self._phases = {optimizer: Phase() for optimizer in optimizers}
        self._active: dict[Optimizer, list[Opened]] = {}
        self._tell = Teller(self.steps, seed).tell
        device, elements = managed[0].weight.device, sum(one.weight.numel() for one in managed)
        self._hands_over = compiled is None
        self._alone = compiled is None and onepass.takes_all(managed)
        self._each = fused.run if compiled is None and not self._alone and fused.pays(managed) else passes.piecewise
        around = not self._alone and self._each is passes.piecewise
        self.compiled = around and passes.compile_pays(elements, device) if compiled is None else compiled
        self._insist = compiled is True
        self._whole = passes.whole({})

    # Between steps.

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin_run(self) -> None:
        """Create everything that a state dictionary holds, also for methods that start later: a checkpoint is read into what is there."""
        for one in self._managed:
            self.prepare(one)
        self.begin_due()

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin_due(self) -> None:
        """Begin the method for every parameter whose start has come; a frozen one begins with the first of the others."""
        last = max(self.steps.values(), default=0)
        due = [
            one for one in self._managed if not one.begun and (last if one.optimizer is None else self.steps[one.optimizer]) >= self._start
        ]
        for one in due:
            if self._start:
                self.prepare(one)
            one.begun = True
            if one.method.deploy is not None:
                one.latent = one.weight.clone(memory_format=torch.preserve_format)
        self.agree(due, show=False)
        for one in due:
            if one.latent is not None:
                self.show(one)

    def agree(self, managed: Iterable[Managed], *, show: bool = True) -> None:
        """Fit scales that span shards to the weights on all ranks, and show the weights whose scales have changed."""
        for one in sharding.agree([(one, one.source) for one in managed if one.groups]):
            if show and one.latent is not None:
                self.show(one)

    def prepare(self, one: Managed) -> None:
        """Make the method's own tensors and search scales, from the parameter's value."""
        if one.method.init is not None:
            one.tensors = one.method.init(wide(one.blocks(one.weight)), one.grid)
        one.refit(one.weight)

    def jump(self, optimizer: Optimizer, step: int) -> None:
        """Go to a step count that was loaded; methods that start later are not on yet, others are."""
        self.steps[optimizer] = step
        if step < self._start:
            for one in self._managed:
                if one.optimizer is optimizer:
                    one.begun, one.latent = False, None
        self.begin_due()

    @torch.no_grad()
    def show(self, one: Managed) -> None:
        """Write what the forward pass shall see into the parameter."""
        self._show_into(one, one.weight)
        one.note()

    @torch.no_grad()
    def expected(self, one: Managed) -> Tensor:
        """Return what the latent weight deploys to, on the device and in the dtype that the parameter has now."""
        assert one.latent is not None
        expected = torch.empty_like(one.latent)
        self._show_into(one, expected)
        return expected.to(one.weight)

    def shows(self, one: Managed) -> bool:
        """Whether the parameter's value is what its latent weight deploys to."""
        return torch.equal(self.expected(one), one.weight)

    @property
    def path(self) -> str:
        """How the passes around a step run, if there are any."""
        return "one-pass" if self._alone else "compiled" if self.compiled else "eager" if self._each is passes.piecewise else "numba"

    @property
    def penalty(self) -> str:
        """How the methods' penalties reach the weights."""
        exact = {moments.exact(one.optimizer, one.group) for one in self._managed if one.method.push is not None}
        if len(exact) == 2:
            return "in the first moment where there is one"
        return "in the first moment" if True in exact else "after the step"

    # One step.

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled optimizer.step() runs this as it is
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
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None and creates_state(optimizer):
            return None
        try:
            hooks.settle()
            if closure is None:
                if not overflowed(optimizer):
                    self._open(optimizer, hooks.terms)
                return None
        except BaseException:
            self._undo(optimizer)
            raise
        shown = self._shown(optimizer, closure, hooks.terms)
        return ((args[0], shown, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": shown})

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def after(self, optimizer: Optimizer, frame: FrameType) -> None:
        """Close a step: take the optimizer's result as the latent weight and deploy it."""
        if optimizer not in self._phases or not self._phases[optimizer].outermost(frame):
            return
        if optimizer in self._active:  # else a skipped step, or one that only created optimizer state
            self.steps[optimizer] += 1
            opened = self._active[optimizer]
            regularized = {entry.one: entry.terms for entry in opened if not entry.taken and self._regularizes(entry.one)}
            longer = [entry for entry in opened if self._lengthens(entry.one)]
            early = {one: start for one, *_, start in longer if start is not None or one in regularized or one.fits_apart}
            for one, start in early.items():
                self._run(passes.lengthen, one, self._tell(one, 1.0, moves=True), [one.weight, one.source if start is None else start])
            sharding.agree([(one, one.weight) for one in regularized if one.groups])
            for one, terms in regularized.items():
                self._regularize(one, terms)
            sharding.agree([(one, one.weight) for one, *_ in opened if one.groups and SCALE not in one.tensors])
            for place, entry in enumerate(opened):
                self._finish(entry, longer=self._lengthens(entry.one) and entry.one not in early)
                entry.one.note()
                opened[place] = entry._replace(scales={})  # should a later one fail, what is finished keeps its scales
            del self._active[optimizer]
            self._keep_up(optimizer, {entry.one for entry in opened})
            self.begin_due()
            torch.clear_autocast_cache()
        self._phases[optimizer].close()  # last: an exception above leaves the step to be repaired

    def _keep_up(self, optimizer: Optimizer, stepped: set[Managed]) -> None:
        """Show what had no gradient as the next forward pass shall see it: under a schedule or draws, not as the last one saw it."""
        for one in self._managed:
            if one.latent is not None and one not in stepped and one.optimizer in (optimizer, None) and not one.method.deploys_nearest:
                self.show(one)

    def repair(self) -> None:
        """Undo what a step that ended in an exception left behind: managed parameters go back to before it."""
        for optimizer, phase in self._phases.items():
            if phase.stale:
                self._undo(optimizer)

    @torch.no_grad()
    def _undo(self, optimizer: Optimizer) -> None:
        """Close a step that failed and take back what it did."""
        self._phases[optimizer].close()
        onepass.assign(optimizer, [])
        for entry in self._active.pop(optimizer, []):
            one = entry.one
            if entry.unused:
                one.hand_over()
                self._push(one, entry.terms, undo=True)
            entry.put_scales_back()
            if one.latent is not None:
                self.show(one)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _open(self, optimizer: Optimizer, terms: Terms) -> None:
        """Hand the optimizer latent weights, the method's gradients and a first moment that holds the penalty."""
        mine = [one for one in self._managed if one.begun and one.optimizer is optimizer and one.parameter.grad is not None]
        counted = [(one, terms(one, self.steps[optimizer])) for one in mine]  # may raise: nothing has changed yet
        taken = onepass.assign(optimizer, counted if self._hands_over else [])
        opened = self._active[optimizer] = [remember(one, count, taken=True) for one, count in counted if one in taken]
        for one, count in counted:
            if one in taken:
                continue
            opened.append(remember(one, count, taken=False))
            self._begin(one, count)
            if not one.groups and self._push(one, count):
                opened[-1] = opened[-1]._replace(pushed=moments.step_of(one))
        self._agree_learned(opened)
        for place, entry in enumerate(opened):
            if entry.one.groups and self._push(entry.one, entry.terms):
                opened[place] = entry._replace(pushed=moments.step_of(entry.one))

    def _agree_learned(self, opened: Sequence[Opened]) -> None:
        """Agree on scales that moved with the gradient; others move with the weights, after the step."""
        sharding.agree([(one, one.weight) for one, *_ in opened if one.groups and SCALE in one.tensors])

    def _shown(self, optimizer: Optimizer, closure: Callable[[], Any], terms: Terms) -> Callable[[], Any]:
        """Return the closure with deployed weights inside; what it leaves behind is a step that is open."""

        def run() -> Any:
            opened = self._active.get(optimizer, [])
            first = optimizer not in self._active
            for place, entry in enumerate(opened):
                if entry.one.latent is not None and not entry.taken:
                    if self._lengthens(entry.one):
                        opened[place] = entry._replace(start=entry.one.carried(entry.one.latent if entry.start is None else entry.start))
                    entry.one.latent.copy_(entry.one.weight)
                    self.show(entry.one)
            torch.clear_autocast_cache()
            result = closure()
            if first:
                self._open(optimizer, terms)
            with torch.no_grad():
                for entry in opened:
                    if not entry.taken:
                        self._begin(entry.one, entry.terms)
            self._agree_learned(opened)
            return result

        return run

    def _lengthens(self, one: Managed) -> bool:
        """Whether a method asks for a longer step; the optimizer itself takes none of these."""
        return one.latent is not None and one.method.rate_multiplier != 1

    def _regularizes(self, one: Managed) -> bool:
        """Whether the method takes a step of its own after the optimizer's."""
        return one.method.prox is not None or (one.method.push is not None and not moments.exact(one.optimizer, one.group))

    def _regularize(self, one: Managed, terms: float) -> None:
        """Take the method's own step after the optimizer's: down a penalty that no moment takes, or to the proximal point.

        It is as many times as long as the optimizer's, as under a learning rate that is so many times as high.
        """
        rate = one.group.get("lr", 0.0) * one.method.rate_multiplier
        if one.method.push is not None and not moments.exact(one.optimizer, one.group):
            down = torch.empty_like(one.weight)
            self._run(passes.descend, one, self._tell(one, terms)._replace(lr=rate), [down, one.weight, moments.curvature(one)])
            one.weight.sub_(down)
        if one.method.prox is not None:
            told = self._tell(one, terms * moments.correction(one))._replace(lr=rate)
            if moments.reads_moments(one.method):
                told = told._replace(correction=moments.bias(one))
            self._run(passes.prox, one, told, [one.weight, moments.curvature(one)])

    def _finish(self, entry: Opened, *, longer: bool) -> None:
        """Search scales where that is due, and deploy what the step has made of a parameter; `longer`: its step is yet to be made so."""
        one = entry.one
        assert one.optimizer is not None
        due = self.steps[one.optimizer] % self._refit == 0
        if entry.taken:
            if due and one.quantizer.rule == "mse":
                one.refit(one.source)
                if one.latent is not None:
                    self.show(one)
            return
        if due:
            one.refit(one.weight)
        if one.latent is not None:
            told = self._tell(one, entry.terms, moves=longer)
            self._run(passes.arrive if longer else passes.deploy, one, told, [one.weight, one.latent])

    def _begin(self, one: Managed, terms: float) -> None:
        """Replace the gradient by the method's, and hand over the latent weight; the parameter still holds what the forward pass saw."""
        if one.method.gradient is None:
            one.hand_over()
            return
        one.moved = torch.empty_like(one.tensors[SCALE]) if one.carries else None
        told = self._tell(one, terms, one.source, moves=True)
        grad = local(one.parameter.grad.detach())  # type: ignore[union-attr]
        scaled = getattr(one.optimizer, "grad_scale", None)  # a fused optimizer unscales by itself, under a GradScaler
        if scaled is not None:
            grad.div_(scaled)
        self._run(passes.gradient, one, told, [grad, one.source, one.weight])
        if scaled is not None:
            grad.mul_(scaled)

    def _push(self, one: Managed, terms: float, *, undo: bool = False) -> bool:
        """Add the penalty's gradient to the first moment; False where there is none yet, or the optimizer has none."""
        group = one.group
        if one.method.push is None or not moments.exact(one.optimizer, group) or moments.step_of(one) is None:
            return False
        beta = float(group["betas"][0])
        factor, bias = (1 - beta) / beta * (-1 if undo else 1), moments.bias(one)
        numbers = (factor, passes.REACH**2 * bias, passes.REACH * float(group["eps"]))
        tensors = [one.weight, moments.first(one), moments.curvature(one), moments.second(one)]
        told = self._tell(one, terms * bias if moments.reads_moments(one.method) else terms)
        self._run(passes.push, one, told, tensors, *numbers)
        return True

    def _show_into(self, one: Managed, into: Tensor) -> None:
        assert one.latent is not None
        self._run(passes.show, one, self._tell(one, 1.0, one.latent), [into, one.latent])

    def _run(self, work: passes.Pass, one: Managed, told: Told, tensors: list[Tensor], *numbers: float | Tensor) -> None:
        """Run a pass on the chosen path; the automatic path falls back to eager where compilation fails."""
        if not tensors[0].numel():  # an empty shard
            return
        if self.compiled:
            try:
                self._whole(work, one, told, tensors, *numbers)
                return
            except Exception as error:
                if self._insist:
                    raise
                self.compiled = False
                warnings.warn(f"torch.compile failed ({type(error).__name__}: {error}); the run goes on with the eager path.", stacklevel=2)
        self._each(work, one, told, tensors, *numbers)
