"""quantize: a model onto a target's grid, into the target's own file, loaded again in the runtime and compared, all or nothing."""

import hashlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stepwell.advice.allocation import stored_bits
from stepwell.export.deployed import check_encoded
from stepwell.export.outputs import digest
from stepwell.export.parity import verify
from stepwell.quantizers import Encoded, Quantizer
from stepwell.ship import rounding, targets
from stepwell.ship.artifact import draft
from stepwell.ship.choice import CALIBRATING, METHODS, TRAINED, choose
from stepwell.ship.mixed import mixed
from stepwell.ship.plan import Plan, plan
from stepwell.ship.records import SCHEMES, STATIC, Choice, Losses, Shipped, Weight
from stepwell.ship.rounded import rounded
from stepwell.ship.rounding import Progress
from stepwell.ship.source import Source, check_finite, logits_only, losses
from stepwell.ship.spill import Spill
from stepwell.ship.tokenizer import copy_tokenizer
from stepwell.ship.training import rate_of, train

GIVEN = Choice("given codes", ("asked for",))
SCRATCH = ".codes"  # of the draft: encoded weights until they are exported


@dataclass(frozen=True)
class Order:
    """What is wanted.

    Attributes:
        target: such as "onnx:matmulnbits" or "gguf:q4_0".
        method: "auto", "rtn", "search", "gptq", "ste", "lotion" or "default".
        bits, block: of the grid; None is the target's own.
        tolerance: increase of the loss that counts as good, in its unit; `auto` aims at it.
        steps: of training.
        rate: the learning rate; None is 2e-4 for a folder and 1e-3 for a function.
        skip: names or patterns to leave in float.
        seed: of every random draw.
        force: whether an artifact that is there may be replaced.
        mixed: whether every layer gets bits of its own, the fewest within the tolerance.
        budget: mean bits per quantized weight, scales included, that every layer's own bits have to keep to; None is no budget.
        activations: "int8" or "int8-token": how what goes into the quantized layers is rounded; None leaves it alone.
    """

    target: str
    method: str = "auto"
    bits: int | None = None
    block: int | None = None
    tolerance: float = 0.1
    steps: int = 200
    rate: float | None = None
    skip: tuple[str, ...] = ()
    seed: int = 0
    force: bool = False
    mixed: bool = False
    budget: float | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}: got {self.method!r}.")
        if not self.tolerance > 0:
            raise ValueError(f"`tolerance` must be above 0: got {self.tolerance}.")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1: got {self.steps}.")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"`rate` must be above 0: got {self.rate}.")
        if self.bits is not None and (self.mixed or self.budget is not None):
            raise ValueError(f"`bits` is one width for all layers: got {self.bits} with --mixed or --bits-per-weight. Give one of them.")

        if self.activations is not None:
            self._check_activations()

    def _check_activations(self) -> None:
        """Refuse a scheme that there is not, or that the target's files cannot say."""
        if self.activations not in SCHEMES:
            raise ValueError(f"`activations` must be {' or '.join(SCHEMES)}: got {self.activations!r}.")
        if not targets.route(self.target).activations:
            able = ", ".join(family for family, row in targets.ROUTES.items() if row.activations)
            raise ValueError(f"`activations`: {self.target} holds float ones alone, got {self.activations!r}. Targets with others: {able}.")

    @property
    def aims(self) -> bool:
        """Whether the tolerance is what was asked for, so that missing it is a failure: not where method and bits are the user's own."""
        return self.method == "auto" or self.mixed

    @property
    def grid(self) -> Quantizer:
        """The target's grid."""
        return targets.grid(self.target, bits=self.bits, block=self.block)

    @property
    def learns(self) -> bool:
        """Whether the method cannot do without data."""
        return self.method in ("auto", "gptq", *TRAINED) or self.mixed or self.budget is not None or self.activations == STATIC


@contextmanager
def quantize(
    source: Source, order: Order, out: Path, *, encoded: Mapping[str, Encoded] | None = None, progress: Progress
) -> Iterator[Shipped]:
    """Yield what was shipped, complete but not yet in its place: files may be added to `Shipped.out`; after the block it takes its name.

    Args:
        source: the model, which is rounded in place, and its data.
        order: what is wanted.
        out: the artifact's folder.
        encoded: codes and scales of the model's weights that are shipped as they are; None makes them as the order says.
        progress: told what is being done.

    Raises:
        ValueError: all that is wrong with model, data or order, before anything is written where possible.
        OSError: a full disk.
    """
    route = targets.route(order.target)
    check_order(source, order, route)
    check_finite(source.model)
    grids = order.grid if encoded is None else grids_of(source.model, encoded)
    base = plan(source.model, grids, skip=order.skip, matrices=route.matrices, target=order.target)
    clock, before = Clock(), losses(source)
    with draft(out, force=order.force) as folder, rounded(source, base, order.activations) as activations:
        with clock.part("choice"):
            chosen, choice = (base, GIVEN) if encoded is not None else _decide(source, base, order, progress)
        originals = _Originals(source, list(chosen.grids))
        with clock.part("training" if choice.method in TRAINED else "rounding"):
            if encoded is not None:
                store, notes = _put(source.model, encoded), dict[str, str]()
            else:
                store, notes = _encode(source, chosen, choice.method, order, folder / SCRATCH, progress)
        after = losses(source)
        with clock.part("export"):
            progress("writing", 0, 1)
            written = route.write(source, store, folder / route.file)
            floats = chosen.floats | written.floats
        with clock.part("reading what was encoded"):
            rows = tuple(_weight(name, store[name], originals, notes.get(name, "")) for name in store if name not in floats)
        with clock.part("loading and comparing"):
            progress(f"loading it again, {route.family}", 0, 1)
            with logits_only(source):
                checked = verify(folder / route.file, source.model, source.example, store)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        if source.checkpoint is not None and not route.folder:
            copy_tokenizer(source.checkpoint.folder, folder)
        served = out.absolute() / route.file
        yield Shipped(
            model=source.name, target=order.target, grid=named(chosen), choice=choice, out=str(folder), file=route.file,
            serve=route.serve.format(path=served), files=digests(folder),
            certificate=replace(checked, path=str(served)), weights=rows, floats=floats, notes=written.notes,
            elements=sum(row.elements for row in rows), total=chosen.total, losses=Losses.of(before, after, source.unit),
            tolerance=order.tolerance, seconds=dict(clock.seconds), peak=peak_memory(), facts=source.facts, batches=source.batches,
            activations=activations,
        )  # fmt: skip


def check_order(source: Source, order: Order, route: targets.Route) -> None:
    """Refuse what cannot be done with this source.

    Raises:
        ValueError: a method that needs data where there is none, a target that needs a Hugging Face folder.
    """
    if route.folders and source.checkpoint is None:
        raise ValueError(f"`target` {order.target} ships Hugging Face models: got {source.name}, a function. Give the model's folder.")
    if order.learns and not source.learning:
        wanted = f"--activations {STATIC}" if order.activations == STATIC else f"--method {order.method}"
        raise ValueError(f"`data` must be given for {wanted}: got none. Give --data text.txt, or --method rtn or search.")


class Clock:
    """Wall time, part by part."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside towards one part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sha256_of_values(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's values in float32; a zero without its sign, which no product depends on."""
    values = tensor.detach().float() + 0.0
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def grids_of(model: nn.Module, encoded: Mapping[str, Encoded]) -> dict[str, Quantizer]:
    """Return the grid of every encoded weight; refuse weights that are not the model's.

    Raises:
        ValueError: a name or a shape that the model does not have.
    """
    check_encoded(model, encoded)
    return {name: encoded[name].quantizer for name in encoded}


def named(chosen: Plan) -> str:
    """Return the grids of a plan in words: the one, or how many weights lie on each.

    >>> from stepwell.presets import int2, int4
    >>> named(Plan({"a": int4(), "b": int4(), "c": int2()}, {}, 3, 3))
    '2 on int4 block 32, absmax fp32 scales; 1 on int2 block 32, absmax fp32 scales'
    """
    counts = Counter(str(replace(grid, axis=None)) for grid in chosen.grids.values())
    return next(iter(counts)) if len(counts) == 1 else "; ".join(f"{count} on {grid}" for grid, count in counts.most_common())


def _decide(source: Source, base: Plan, order: Order, progress: Progress) -> tuple[Plan, Choice]:
    """Return the grids and the method."""
    if order.mixed or order.budget is not None:
        grids = targets.widths(order.target, block=order.block)
        chosen, why = mixed(source, base, grids, tolerance=order.tolerance, budget=order.budget, skip=order.skip, progress=progress)
        return chosen, Choice("rtn" if order.method == "auto" else order.method, why)
    if order.method != "auto":
        return base, Choice(order.method, ("asked for",))
    return base, choose(source, base, order.tolerance, rate=order.rate or rate_of(source), progress=progress)


def _put(model: nn.Module, encoded: Mapping[str, Encoded]) -> Mapping[str, Encoded]:
    """Put encoded weights into the model, and return them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in encoded:
            parameters[name].copy_(encoded[name].decode())
    return encoded


def _encode(
    source: Source, chosen: Plan, method: str, order: Order, scratch: Path, progress: Progress
) -> tuple[Mapping[str, Encoded], dict[str, str]]:
    """Return the encoded weights, which the model holds as well, and per weight what was done differently."""
    if method in TRAINED:
        rate = order.rate or rate_of(source)
        found = train(source, chosen, method, steps=order.steps, rate=rate, seed=order.seed, progress=progress)  # type: ignore[arg-type]
        return found, {}
    store, seen = Spill(scratch), source.learning[:CALIBRATING]
    if method == "rtn":
        rounding.rtn(source.model, chosen, store, progress=progress)
    elif method == "search":
        rounding.search(source.model, chosen, store, loss=source.loss, batches=seen, progress=progress)
    else:
        beyond = rounding.by_gptq(source.model, chosen, store, loss=source.loss, batches=seen, progress=progress)
        return store, dict.fromkeys(beyond, "rounded to nearest: its layer cannot be calibrated")
    return store, {}


class _Originals:
    """The float weights, to measure how far rounding moved them: read again from the checkpoint, or copied where there is none."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self._checkpoint = source.checkpoint
        parameters = dict(source.model.named_parameters(remove_duplicate=False))
        absent = [name for name in names if self._checkpoint is None or name not in self._checkpoint.tensors]
        self._copies = {name: parameters[name].detach().clone() for name in absent}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._copies:
            return self._copies[name]
        assert self._checkpoint is not None
        return self._checkpoint.read(name)


def _weight(name: str, encoded: Encoded, originals: _Originals, method: str) -> Weight:
    """Describe one weight as it was encoded."""
    shape, original = tuple(encoded.codes.shape), originals[name].double()
    norm, value = float(original.norm()), encoded.decode()
    error = float(torch.dist(value.double(), original)) / norm if norm else 0.0
    return Weight(name, shape, str(encoded.quantizer), stored_bits(encoded.quantizer, shape), error, sha256_of_values(value), method)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file by its name inside the folder."""
    return {file.relative_to(folder).as_posix(): digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}
