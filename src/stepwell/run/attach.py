"""attach: put a method on a model and its optimizers. The user's loop does not change.

Between two steps every managed parameter holds what the forward pass shall see. One step is

    before:  parameter <- latent;  gradient <- method.gradient(..);  first moment += method.push(..)
    the user's own optimizer steps
    after:   latent <- method.prox(parameter, ..);  parameter <- method.deploy(latent)
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stepwell.health import Health, Watch
from stepwell.methods.base import Method
from stepwell.methods.distill import Loss, plain
from stepwell.quantizers import Encoded
from stepwell.run import notices, sharding, state, writes
from stepwell.run.calibrate import BatchLoss, Calibration, calibrate
from stepwell.run.check import managed_of, optimizers_of
from stepwell.run.managed import Managed, groups_of
from stepwell.run.opened import Hooks
from stepwell.run.rounds import Rounds, Watcher
from stepwell.run.step import Stepper
from stepwell.run.terms import LossTerms, terms_of

_LIVE: WeakSet["Run"] = WeakSet()  # runs that have not ended: two on one parameter would undo each other


class Run:
    """A method living on a model and its optimizers; made by `attach`.

    A step that ends in an exception is repaired by the next call of a Run's method, or else by the next step.

    Attributes:
        model: what the method lives on.
        loss_terms: loss terms averaged per optimizer step: a number, or a function of the step; None takes the method's. Over all ranks.
        loss: `loss(logits, targets, *inputs)`, the cross entropy, with the teacher that `quantize_training` was given in it.
    """

    def __init__(self, model: nn.Module, managed: list[Managed], optimizers: list[Optimizer], stepper: Stepper) -> None:
        """Register the hooks; `attach` has checked everything."""
        self.model = model
        self.loss_terms: LossTerms = None
        self.loss: Loss = plain
        self._managed, self._optimizers, self._rounds = managed, optimizers, Rounds(optimizers)
        self._frozen = [one for one in managed if one.optimizer is None]
        self._stepper = stepper
        self._watch: dict[str, Watch] = {}
        self._warned = False
        self._shown: str | None = None
        self._incoming: dict[Optimizer, dict[Managed, dict[str, Any]]] = {}
        self._handles = [handle for optimizer in optimizers for handle in self._hooks(optimizer)]
        try:
            self._stepper.begin_run()
        except BaseException:
            for one in managed:
                if one.latent is not None:
                    one.weight.copy_(one.latent)
            self._remove()
            raise
        _LIVE.add(self)

    def __repr__(self) -> str:
        elements = sum(one.parameter.numel() for one in self._managed)
        extra = sum(one.latent.numel() * one.latent.element_size() for one in self._managed if one.latent is not None)
        names = ", ".join(dict.fromkeys(f"{one.method.name} on {one.quantizer}" for one in self._managed))
        live = "" if self._handles else ", detached"
        push = "" if not any(one.method.push for one in self._managed) else f", penalty {self._stepper.penalty}"
        return (
            f"Run({names}: {len(self._managed)} parameters, {elements:,} elements; step {self.steps}; {self._stepper.path} path; "
            f"{extra / 1e6:.1f} MB of latent weights{push}{live})"
        )

    @property
    def steps(self) -> int:
        """Optimizer steps done since the run began, resumed ones included."""
        return max((self._stepper.steps.get(optimizer, 0) for optimizer in self._optimizers), default=0)

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Hold grid weights in the model while the block runs, whatever the method; evaluate inside."""
        with self._showing("deployed"):
            others = [one for one in self._managed if one.latent is None or not one.method.deploys_nearest]
            saved = [(one, one.weight.clone()) for one in others]
            try:
                for one in others:
                    one.weight.copy_(one.rounded())
                    one.note()
                torch.clear_autocast_cache()
                yield
            finally:
                for one, weight in saved:
                    if one.untouched:  # else somebody loaded other values, which stay
                        one.weight.copy_(weight)
                self._adopt_writes()

    @contextmanager
    def latent(self) -> Iterator[None]:
        """Hold the latent weights in the model while the block runs; what is written to them there is kept."""
        with self._showing("latent"):
            held = [(one, one.latent) for one in self._managed if one.latent is not None]
            try:
                for one, latent in held:
                    one.weight.copy_(latent)
                torch.clear_autocast_cache()
                yield
            finally:
                for one, latent in held:
                    if torch.equal(one.weight, latent):
                        self._stepper.show(one)
                    else:
                        writes.take_over(one, self._stepper)
                self._stepper.agree(self._managed)

    def finalize(self) -> dict[str, Encoded]:
        """Leave the weights on the grid, remove every hook, and return what is stored and shipped.

        Returns:
            Parameter name -> `Encoded`, in the model's order; each parameter equals its `decode()`, cast to the parameter's dtype.
        """
        self._end("finalize")
        encoded = self.encoded()
        for one in self._managed:
            one.weight.copy_(one.rounded())
        self._remove()
        return encoded

    def encoded(self) -> dict[str, Encoded]:
        """Return what `finalize` would return now; the run goes on."""
        self._settle()
        return {one.name: one.encode() for one in self._managed}

    def detach(self, *, keep: Literal["latent", "deployed"] = "latent") -> None:
        """Remove every hook and leave the latent weights in the model, or what the forward pass saw."""
        if keep not in ("latent", "deployed"):
            raise ValueError(f"`keep` must be 'latent' or 'deployed': got {keep!r}.")
        self._end("detach")
        for one in self._managed:
            if keep == "latent" and one.latent is not None:
                one.weight.copy_(one.latent)
        self._remove()

    def health(self) -> Health:
        """Return flips, oscillation, dead and clipped weights since the last call, and how far the weights are from the grid.

        Costs one pass over the weights and, from the first call on, three bytes per element. Over all shards where parameters are sharded:
        call it on every rank then, as `encoded`, `finalize` and `deployed`.
        """
        self._settle()
        rows = {}
        for one in self._managed:
            watch = self._watch.setdefault(one.name, Watch())
            rows[one.name] = watch.look(one.blocks(one.source), one.grid, one.held_fit(one.source))
        return Health(sharding.pooled(self._managed, rows))

    def calibrate(self, loss: BatchLoss, batches: Iterable[Any], *, draws: int = 8, every: int | None = None) -> Calibration:
        """Set `loss_terms` to what makes the penalty cost what randomized rounding costs, so that nobody needs to count.

        Args:
            loss: `loss(model, batch)`, the mean loss of a batch as a tensor with one element.
            batches: of the size that a training step sees.
            draws: of randomized rounding, each a forward pass over all batches.
            every: measure again on the same batches whenever that many optimizer steps are done.
        """
        self._end("calibrate")
        return calibrate(self, self._managed, loss, batches, draws=draws, every=every)

    def on_step(self, watcher: Watcher) -> RemovableHandle:
        """Call `watcher(False)` whenever all optimizers have stepped, `watcher(True)` before the run ends; the handle has `remove()`."""
        self._settle()
        return self._rounds.add(watcher)

    def _hooks(self, optimizer: Optimizer) -> list[Any]:
        """Register the five hooks on one optimizer."""
        asked = Hooks(self._check_in, lambda one, step: terms_of(self.loss_terms, one.method, step))

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self._shown is not None:
                raise RuntimeError(
                    f"optimizer.step() inside `run.{self._shown}()`: the weights there are for looking. Leave the block first."
                )
            self._rounds.begins(optimizer)
            replaced: tuple[tuple[Any, ...], dict[str, Any]] | None = self._stepper.before(
                optimizer, (args, kwargs), sys._getframe(1), asked
            )
            return replaced

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before = self._stepper.steps.get(optimizer)
            self._stepper.after(optimizer, sys._getframe(1))
            if before is None or self._stepper.steps[optimizer] != before:  # not skipped, not the inner call of a subclass
                self._rounds.ends(optimizer)

        def outgoing(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            self._settle(warn=self.steps > 0)  # a checkpoint being loaded reads this first: before any step nothing can be lost
            return state.add(optimizer, state_dict, self._managed, self._stepper.steps.get(optimizer, 0), self.loss_terms)

        def incoming(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            if self._shown is not None:
                raise RuntimeError(f"optimizer.load_state_dict() inside `run.{self._shown}()`: leave the block first.")
            plain, self._incoming[optimizer] = state.split(optimizer, state_dict, self._managed)
            return plain

        def loaded(optimizer: Optimizer) -> None:
            self._restore(optimizer, self._incoming.pop(optimizer, {}))

        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
            optimizer.register_state_dict_post_hook(outgoing),
            optimizer.register_load_state_dict_pre_hook(incoming),
            optimizer.register_load_state_dict_post_hook(loaded),
        ]

    def _restore(self, optimizer: Optimizer, entries: dict[Managed, dict[str, Any]]) -> None:
        """Take back what a loaded state dictionary held for one optimizer."""
        step, self.loss_terms = state.loaded_step(entries), state.loaded_terms(entries, self.loss_terms)
        self._stepper.repair()
        for one, latent in state.frozen_latents(entries, self._managed):
            one.weight.copy_(latent)
            self._stepper.prepare(one)
            one.begun, one.latent = False, None  # it begins again, with the others
        if step is not None:
            self._stepper.jump(optimizer, step)
        missing = []
        for one in self._managed:
            if one.optimizer is not optimizer:
                continue
            state.restore(one, entries.get(one, {}))
            if one.latent is None:
                continue
            one.follow()
            if state.LATENT not in entries.get(one, {}):
                missing.append(one.name)
                if not one.untouched and not self._stepper.shows(one):
                    writes.take_over(one, self._stepper)
            self._stepper.show(one)
        self._stepper.agree(self._managed)
        if missing:
            state.warn_missing(missing)

    def _adopt_writes(self, *, by_value: bool = False, warn: bool = True) -> None:
        """Make values that somebody else wrote into a parameter its new latent weights, and say so once."""
        changed, rounded = writes.adopt(self._managed, self._stepper, by_value=by_value)
        if changed and warn and not self._warned:
            self._warned = True
            count = f", {rounded:,} of them rounded to a grid value" if rounded else ""
            warnings.warn(
                f"{len(changed)} parameters such as {changed[0]!r} were written to from outside the run (load_state_dict, a weight "
                f"average): the new values become the latent weights{count}. To resume a run, load `optimizer.state_dict()` after them.",
                stacklevel=6,
            )

    def _settle(self, *, warn: bool = True) -> None:
        """Repair what an exception left and adopt outside writes; every public call starts here."""
        if not self._handles:
            raise RuntimeError("this run has ended (`finalize` or `detach`). Attach a method again to go on.")
        sharding.reshard(self.model)
        writes.refuse_orphans(self._managed)
        self._stepper.repair()
        if self._shown is None:
            self._adopt_writes(by_value=True, warn=warn)

    def _check_in(self) -> None:
        """Look at the parameters before a step."""
        writes.refuse_thawed(self._frozen)
        writes.refuse_orphans([one for one in self._managed if one.parameter.grad is None and not groups_of(one.parameter)])
        self._adopt_writes()

    def _end(self, what: str) -> None:
        self._settle()
        if self._shown is not None:
            raise RuntimeError(f"`run.{what}()` inside `run.{self._shown}()`: leave the block first.")
        self._rounds.call(last=True)

    @contextmanager
    def _showing(self, what: str) -> Iterator[None]:
        self._settle()
        if self._shown is not None:
            raise RuntimeError(f"`run.{what}()` inside `run.{self._shown}()`: leave the first block before opening the next.")
        self._shown = what
        try:
            yield
        finally:
            self._shown = None
            sharding.reshard(self.model)
            for one in self._managed:
                one.note()
            torch.clear_autocast_cache()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _LIVE.discard(self)
        torch.clear_autocast_cache()


def attach(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    skip: Sequence[str] = (),
    start: int = 0,
    seed: int = 0,
    refit: int = 100,
    compile: bool | None = None,
) -> Run:
    """Put a training method on a model's weights; the loop around it does not change.

    Args:
        model: any module, already on its device and sharded.
        method: `ste(q)`, `lotion(q, ..)`, ..; or a mapping from names to methods in which the first match wins and None leaves out.
        optimizer: the optimizer, or all of them, that hold the selected parameters; `sw.optim.AdamW` steps many of them in one pass.
        skip: parameter or module names, or shell patterns, to leave in float.
        start: optimizer steps before the method begins; until then training is plain.
        seed: of every random draw; a draw depends on it, the step, the parameter's name and the element's place.
        refit: steps between two searches of scales whose rule is a search; absmax scales are refitted at each step.
        compile: True runs the passes around a step through `torch.compile`, False eagerly. None takes numba's kernels from a million
            weights on a CPU (they compile once per machine, in seconds), `torch.compile` from sixteen million where a compiler is found.

    Returns:
        The `Run`. `optimizer.state_dict()` then carries everything that resumes it: build, attach, load, in this order.

    Raises:
        TypeError, ValueError: everything that can be wrong, with the parameter's name, before anything is changed.
    """
    optimizers = optimizers_of(optimizer)
    for name, value, least in (("start", start, 0), ("refit", refit, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of steps, {least} or more: got {value!r}.")
    managed = managed_of(model, method, optimizers, skip)
    for run in list(_LIVE):
        taken = {id(one.parameter) for one in run._managed}
        twice = next((one.name for one in managed if id(one.parameter) in taken), None)
        if twice is not None:
            raise ValueError(f"{twice!r} already has a run: {run!r}. Call its `finalize()` or `detach()` first.")
    made = Run(model, managed, optimizers, Stepper(managed, start=start, seed=seed, refit=refit, compiled=compile))
    notices.watch(made, managed)
    return made
