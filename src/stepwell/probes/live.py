"""Log: a training run looked at while it goes on: gradients (D4), codes (D5), latent weights (D7) and health, step by step.

Nothing of the run changes: weights, gradients, optimizer state, BatchNorm statistics, modes and the random state are what they would be
without it. A look costs two forward and two backward passes over the data of `loss`, and two copies of the weights while it lasts; the
log keeps the reference and three bytes per weight. Symbols as in `look`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.blocks import to_blocks
from stepwell.health import Health, Vitals, Watch
from stepwell.probes.grid import grid
from stepwell.probes.inward import against
from stepwell.probes.latent import moves
from stepwell.probes.look import Look, from_row, lost, row, table, write_csv, write_json
from stepwell.probes.points import Place, Weights, matching, weight, working
from stepwell.probes.stage import Loss, Stage, check_tolerance, staged, unchecked
from stepwell.quantizers import Encoded
from stepwell.run.attach import Run


class Log:
    """Looks at a run when it is made, after 1, 2, 4, 8, .. steps or after every so many, and before the run ends.

    Attributes:
        start: L(b), the loss at the reference, with biases and whatever else the run does not round as they were when the log was made.
        rounded: L(r), the same with the reference rounded to nearest on the run's grid.
        tolerance: growth of the loss that still counts as inside.
    """

    def __init__(
        self,
        run: Run,
        loss: Loss,
        *,
        reference: Weights | None = None,
        every: int | None = None,
        tolerance: float = 0.1,
        on_look: Callable[[Look], None] | None = None,
    ) -> None:
        """Check everything, measure the reference, take the first look, and hang on the run's steps.

        Args:
            run: what `attach` returned, on parameters that are not sharded.
            loss: evaluates the model on fixed data and returns one number as a tensor; it is called in evaluation mode. Under
                DistributedDataParallel let it call the module inside: what is differentiated here must not meet its gradient buckets.
            reference: b, the weights that training began with, by name, taken before `attach`; None is the latent weights now, which is
                right for a run that has just begun. Kept as one copy.
            every: steps between two looks; None looks after 1, 2, 4, 8, .. steps.
            tolerance: growth of the loss that still counts as inside, above 0.
            on_look: called with every look: show progress, send it to a tracker, save what is best so far.

        Raises:
            TypeError, ValueError: as `inward`; a reference that lacks weights or moves with the model; sharded parameters.
            RuntimeError: a run that has ended.
        """
        if not isinstance(run, Run):
            raise TypeError(f"`run` must be what `attach` returned: got {type(run).__name__}.")
        check_tolerance(tolerance)
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every` must be a whole number of steps, 1 or more, or None for 1, 2, 4, 8, ..: got {every!r}.")
        if on_look is not None and not callable(on_look):
            raise TypeError(f"`on_look` must be a function of a Look, or None: got {type(on_look).__name__}.")
        self._run, self._loss, self._every, self._on_look, self.tolerance = run, loss, every, on_look, tolerance
        self._looks: list[Look] = []
        self._watches: dict[str, Watch] = {}
        self._reference: Place = {}
        self.start = self.rounded = math.nan
        self._measure(reference)
        self()
        self._handle = run.on_step(self._stepped)

    def __call__(self) -> Look:
        """Look now, and return what is seen; once per step: a second call returns the first one's look.

        Not between a forward pass and its backward pass, which would find its weights moved.
        """
        if not self._looks or self._looks[-1].step != self._run.steps:
            self._looks.append(self._look())
            if self._on_look is not None:
                self._on_look(self._looks[-1])
        return self._looks[-1]

    def __str__(self) -> str:
        return f"{table(self._looks)}\nreference {self.start:.4f}, rounded to nearest {self.rounded:.4f}, tolerance {self.tolerance:g}"

    @property
    def looks(self) -> tuple[Look, ...]:
        """All looks so far; `contrast` takes them."""
        return tuple(self._looks)

    @property
    def best(self) -> Look:
        """The look with the lowest deployed loss."""
        return min(self._looks, key=lambda look: math.inf if math.isnan(look.loss) else look.loss)

    @property
    def entry(self) -> int | None:
        """The first step seen with a deployed loss within tolerance; None where there was none."""
        return next((look.step for look in self._looks if not look.outside), None)

    @property
    def stay(self) -> float:
        """Share of the looks after the entry that are within tolerance: entering is not staying. NaN without any."""
        inside = [not look.outside for look in self._looks if self.entry is not None and look.step > self.entry]
        return sum(inside) / len(inside) if inside else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """Return the looks as plain numbers by column."""
        return [row(look) for look in self._looks]

    def csv(self, path: str | Path) -> None:
        """Write one line per look."""
        write_csv(self._looks, path)

    def json(self, path: str | Path) -> None:
        """Write `start`, `rounded`, `tolerance` and the looks; numbers that are not finite become null."""
        write_json(self._looks, {"start": self.start, "rounded": self.rounded, "tolerance": self.tolerance}, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the looks and the reference, to be saved beside the optimizer's state where the log shall go on after a resume."""
        return {"rows": self.rows(), "reference": dict(self._reference), "start": self.start, "rounded": self.rounded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved log: its reference and its looks take the place of this one's. Flips are counted anew from here.

        Raises:
            ValueError: as `Log`, of the saved reference.
        """
        self._reference = _fixed(self._run.model, state["reference"], self._reference)
        self._looks = [from_row(numbers) for numbers in state["rows"]]
        self._watches = {}
        self.start, self.rounded = state["start"], state["rounded"]

    def close(self) -> None:
        """Look no more; what was seen stays."""
        self._handle.remove()

    def _stepped(self, last: bool) -> None:
        """Look where it is time to; called by the run."""
        step = self._run.steps
        due = step & (step - 1) == 0 if self._every is None else step % self._every == 0
        if due or last:
            self()

    @torch.inference_mode(False)
    def _measure(self, reference: Weights | None) -> None:
        """Keep the reference, and measure it as it is and rounded."""
        run, encoded = self._run, self._run.encoded()
        for name in encoded:
            if hasattr(run.model.get_parameter(name), "to_local"):
                raise ValueError(f"`run` must hold whole parameters to be logged: got {name!r} sharded. Log a run on one device.")
        with run.latent(), _same_randomness(run.model):
            given = {name: run.model.get_parameter(name).detach().clone() for name in encoded} if reference is None else reference
            self._reference = _fixed(run.model, given, dict(encoded))
            with staged(run.model, self._loss, encoded) as stage:
                stage.put(lambda name, base: weight(self._reference[name], base))
                self.start = stage.loss()
                stage.put(lambda name, base: grid(encoded[name], base).round(weight(self._reference[name], base)))
                self.rounded = stage.loss()
                stage.put(lambda name, base: base)
                stage.gradient()  # a loss without a graph is refused here, not at step 1000

    @torch.inference_mode(False)
    def _look(self) -> Look:
        """Measure where the run is."""
        run, best = self._run, min((look.best for look in self._looks), default=math.inf)
        with run.latent():
            if not all(bool(run.model.get_parameter(name).isfinite().all()) for name in self._reference):
                return lost(run.steps, best)
        encoded = run.encoded()
        with run.latent(), _same_randomness(run.model), unchecked(run.model, self._loss, encoded) as stage:
            latent_loss, latent = against(stage, dict(encoded), self._reference)
            moved, vitals = moves(stage, encoded, self._reference), self._health(stage, encoded)
            stage.put(lambda name, base: weight(encoded[name], base))
            loss, deployed = against(stage, dict(encoded), self._reference)
            return Look(
                step=run.steps,
                loss=loss,
                latent_loss=latent_loss,
                best=min(best, loss),
                outside=not loss <= self.start + self.tolerance,
                cosine=deployed.cosine,
                latent_cosine=latent.cosine,
                projection=deployed.projection,
                changed=moved.changed,
                near=moved.near,
                steps_moved=moved.steps,
                farthest=moved.farthest,
                compensation=moved.compensation,
                distance=moved.distance,
                rounded_distance=moved.rounded_distance,
                latent_distance=moved.latent_distance,
                flips=vitals.flips,
                oscillation=vitals.oscillation,
                dead=vitals.dead,
                clipped=vitals.clipped,
                off_grid=vitals.distance,
                finite=vitals.finite,
                cost=stage.cost,
            )

    def _health(self, stage: Stage, encoded: dict[str, Encoded]) -> Vitals:
        """Return what happened to the codes since the look before; `run.health()` counts for itself."""
        rows = {}
        for name, one in encoded.items():
            base, quantizer = working(stage.base[name]), one.quantizer
            watch = self._watches.setdefault(name, Watch())
            blocks = to_blocks(base, quantizer.block, quantizer.axis)
            rows[name] = watch.look(blocks, quantizer.local(), grid(one, base).fit)
        return Health(rows).total


def _fixed(model: nn.Module, given: Weights, like: Place) -> Place:
    """Return a copy of a reference for the weights of a run, or refuse one that does not fit or would move with the model."""
    found: Place = {}
    for name, value in matching(model, given, "reference", like).items():
        parameter = model.get_parameter(name)
        if value is None:
            raise ValueError(f"`reference` holds the model's own {name!r}, which moves with training. Pass a copy taken before `attach`.")
        copied: Tensor = weight(value, working(parameter)).clone()
        found[name] = copied
    return found


@contextmanager
def _same_randomness(model: nn.Module) -> Iterator[None]:
    """Leave the random state as it was: reading a DataLoader inside `loss` draws from it."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
