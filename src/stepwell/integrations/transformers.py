"""Hugging Face's Trainer: `Trainer(model, args, optimizers=(optimizer, scheduler))` after `attach` trains as any loop does.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    run = sw.attach(model, sw.lotion(q, forward="nearest"), optimizer)
    follow = trainer_callback(run)
    Trainer(model, args, train_dataset=.., optimizers=(optimizer, scheduler), callbacks=[follow]).train()
    follow.encoded                     # codes and scales by parameter name; `model` holds exactly these weights

Under FSDP the Trainer takes no optimizer: it makes its own, and accelerate puts shards in place of the parameters. The run then begins
between the two, in a Trainer that knows when:

    def begin(model, optimizer):
        return sw.attach(model, sw.lotion(q, forward="nearest"), optimizer)

    made = attaching_trainer(begin)(model, args, train_dataset=..)     # args: TrainingArguments(fsdp=True, ..)
    made.train()
    made.follow.encoded                # the callback is there already

It serves one process and DDP as well. On a CPU accelerate takes `fsdp` for DDP, without a word.

What lies in a checkpoint folder:

| file | holds |
|---|---|
| `model.safetensors` | what the forward pass sees: weights on the grid under STE and its relatives, latent weights under LOTION alone |
| `encoded.safetensors` | the codes and scales that would ship, exactly; written by the callback, read by `sw.load` |
| `optimizer.pt` and others | torch's pickles, written and read (`weights_only=True`) by Trainer alone; this one has latent weights |

Resuming needs all of them, and is bit for bit. `load_best_model_at_end` loads `model.safetensors` of the best checkpoint into a model whose
latent weights and learned scales are those of the last step; the callback ends the run there and puts that checkpoint's encoded weights
into the model. Without the callback: `run.finalize()` before the model is saved, and no `load_best_model_at_end`.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stepwell.export.extras import need
from stepwell.health import FRACTIONS, Vitals
from stepwell.quantizers import Encoded
from stepwell.run.attach import Run
from stepwell.run.check import has_run
from stepwell.storage import load, save
from stepwell.train.ranks import here, put_

FILE = "encoded.safetensors"
IGNORED = -100  # the label that transformers leaves out of a loss


def trainer_callback(run: Run, *, count: bool = True) -> Any:
    """Return the callback of a Trainer whose model has a run.

    It evaluates on the deployed weights, so that `eval_loss` and `metric_for_best_model` are those of what ships; adds the run's health to
    what is logged (flips, oscillation, dead, clipped, distance); writes `encoded.safetensors` into every checkpoint folder and, at the
    end, into the output folder; and ends the run, with the best checkpoint's weights where `load_best_model_at_end` asks for them.

    Args:
        run: of the model and optimizer that the Trainer is given.
        count: set `run.loss_terms` before every step to the labels that the step averages over, as Trainer counts them: over micro-batches
            and ranks, padding left out. False leaves what the run or its method was told.

    Returns:
        A `transformers.TrainerCallback` with `encoded`, the weights that ship, None before the end of training.

    Raises:
        ModuleNotFoundError: transformers or accelerate is not installed.
    """
    need("transformers", "accelerate", extra="hf")
    from transformers import TrainerCallback

    return type("StepwellCallback", (_Following, TrainerCallback), {})(run, count)


def attaching_trainer(attach: Callable[[nn.Module, Optimizer], Run], *, base: type | None = None, count: bool = True) -> Any:
    """Return a class of Trainers that make their optimizer themselves and attach to it at the one moment when that is right.

    It is when accelerate has prepared model and optimizer, which under FSDP2 are shards by then, and no checkpoint has been loaded yet.

    Args:
        attach: `attach(model, optimizer)` -> the run, called whenever training begins, which it does again with `auto_find_batch_size`;
            the optimizer is that of `args` or of `create_optimizer`.
        base: the Trainer to derive from, such as TRL's; None is transformers' own.
        count: as in `trainer_callback`.

    Returns:
        A subclass of `base`, made and used like it; from `train` on it has `follow`, the callback (see `trainer_callback`).

    Raises:
        ModuleNotFoundError: transformers or accelerate is not installed.
    """
    need("transformers", "accelerate", extra="hf")
    from transformers import Trainer

    return type("AttachingTrainer", (_Attaching, base or Trainer), {"_attach": staticmethod(attach), "_count": count})


class _Attaching:
    """Attaches when the optimizer holds what it will step; made by `attaching_trainer`."""

    follow: Any = None
    _attach: Callable[[nn.Module, Optimizer], Run]
    _count: bool

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Begin the run, then make the schedule: Trainer calls this once everything is prepared, and loads a checkpoint after it."""
        trainer: Any = self
        stepped = _bare(optimizer or trainer.optimizer)
        if trainer.follow is not None:
            trainer.remove_callback(trainer.follow)
            trainer.follow.leave(stepped)
        _refuse_renamed(trainer.model)
        run = self._attach(trainer.model, stepped)
        if not isinstance(run, Run):
            raise TypeError(f"`attach` must return the run that `sw.attach` gives it: got {type(run).__name__}.")
        trainer.follow = trainer_callback(run, count=self._count)
        trainer.add_callback(trainer.follow)
        parent: Any = super()
        return parent.create_scheduler(num_training_steps, optimizer)


class _Following:
    """Follows a run through a Trainer's events; made by `trainer_callback`."""

    def __init__(self, run: Run, count: bool) -> None:
        self.run = run
        self.encoded: dict[str, Encoded] | None = None
        self._terms: float | None = None
        self._told = False
        self._vitals: Vitals | None = None
        self._shown = ExitStack()
        self._hook = run.model.register_forward_pre_hook(self._count, with_kwargs=True) if count else None

    # Events, in the order in which a step meets them. Trainer passes much else by keyword.

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Check that the Trainer steps what the run lives on; show deployed weights to an evaluation before the first step."""
        if not has_run(_bare(rest["optimizer"])):
            raise RuntimeError(
                "the Trainer steps an optimizer of its own, which has no run: nothing would be trained for the grid. Give it the run's by "
                "`optimizers=(optimizer, scheduler)`, or, under FSDP, where it takes none, use `attaching_trainer(..)` in place of Trainer."
            )
        if args.eval_on_start:
            self._show()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Tell the run what the step averages over, on all ranks."""
        if self._terms is None:
            return
        ranks, everywhere = here(args.device), self._told and args.average_tokens_across_devices
        terms, self._terms = self._terms, None
        if ranks.size > 1 and not everywhere:
            terms = float(ranks.total(torch.tensor(terms, dtype=torch.float64, device=ranks.device)))
        if terms:
            self.run.loss_terms = terms

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Look at the run for the line that is logged, then show deployed weights to the evaluation, where these follow."""
        if control.should_log:
            self._vitals = self.run.health().total
        if control.should_evaluate:
            self._show()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Do the same at the end of an epoch."""
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Go back to what the run trains."""
        self._shown.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Add the run's health to a line about training."""
        if self._vitals is None or not logs or "loss" not in logs:
            return
        found = {f"run_{key}": value for key in FRACTIONS if not math.isnan(value := getattr(self._vitals, key))}
        logs.update(found)
        state.log_history[-1].update(found)
        self._vitals = None

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the codes and scales of this step beside the checkpoint that was just written."""
        encoded = self.run.encoded()  # gathers shards, so on every rank
        if state.is_world_process_zero:
            save(encoded, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """End the run: on the best checkpoint's weights where it was loaded, else on the last step's."""
        self._shown.close()
        if self._hook is not None:
            self._hook.remove()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is None:
            self.encoded = self.run.finalize()
        else:
            self.encoded = load(Path(best) / FILE)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*written to from outside the run")  # by Trainer, and about to be replaced
                self.run.detach(keep="deployed")
            put(self.run.model, self.encoded)
        if state.is_world_process_zero:
            save(self.encoded, Path(args.output_dir) / FILE)

    def leave(self, optimizer: Optimizer) -> None:
        """Let go of a run that training broke off (too large a batch, an interruption): the next one begins on its latent weights."""
        self._shown.close()
        if self._hook is not None:
            self._hook.remove()
        if has_run(optimizer):
            self.run.detach()

    def _show(self) -> None:
        """Hold deployed weights until the evaluation is over."""
        self._shown.close()
        self._shown.enter_context(self.run.deployed())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the count that Trainer hands to a model that asks for it, else count the labels of this micro-batch."""
        if not model.training:
            return
        told, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        self._told = told is not None
        if told is not None:
            self._terms = float(told)
        elif isinstance(labels, Tensor):
            self._terms = (self._terms or 0.0) + float(labels.ne(IGNORED).sum())


def _bare(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside what accelerate makes of it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


def _refuse_renamed(model: nn.Module) -> None:
    """Refuse parameters whose names no checkpoint has."""
    if any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules()):
        raise ValueError(
            "`fsdp_config`: its `activation_checkpointing` renames the parameters, and the codes would be written under names that no "
            "model has. Use `gradient_checkpointing=True` of TrainingArguments, which does the same."
        )


def put(model: nn.Module, encoded: Mapping[str, Encoded]) -> None:
    """Write encoded weights into a model's parameters of these names, sharded ones included."""
    parameters = dict(model.named_parameters())
    for name, one in encoded.items():
        put_(parameters[name], one.decode())
