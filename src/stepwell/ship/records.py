"""What shipping returns: frozen records of plain values, which a page, a table and JSON are made of."""

import math
import statistics
from dataclasses import dataclass

from stepwell.export.certificate import Certificate

STATIC = "int8"
SCHEMES = {STATIC: "int8, one range per layer", "int8-token": "int8, one scale per token"}


@dataclass(frozen=True)
class Weight:
    """One quantized weight.

    Attributes:
        name: of the parameter.
        shape: its shape.
        grid: in words.
        bits: stored per weight, scales and zero points included.
        error: relative distance from the float weight, `|q - w| / |w|`.
        sha256: of the float32 values that it stands for, by which a later check knows it again.
        method: how it was rounded, where that differs from the others.
    """

    name: str
    shape: tuple[int, ...]
    grid: str
    bits: float
    error: float
    sha256: str
    method: str = ""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Losses:
    """The loss before and after, over the measuring batches.

    Attributes:
        before, after: means.
        stderr: of their difference, from paired differences over batches; NaN for one batch.
        unit: of the loss.
        batches: how many.
    """

    before: float
    after: float
    stderr: float
    unit: str
    batches: int

    @property
    def increase(self) -> float:
        """How much the loss has grown."""
        return self.after - self.before

    @classmethod
    def of(cls, before: list[float], after: list[float], unit: str) -> "Losses | None":
        """Return the comparison of the losses of the same batches; None without any."""
        if not before:
            return None
        changes = [two - one for one, two in zip(before, after, strict=True)]
        many = len(changes) > 1 and all(map(math.isfinite, changes))
        stderr = statistics.stdev(changes) / math.sqrt(len(changes)) if many else math.nan
        return cls(statistics.fmean(before), statistics.fmean(after), stderr, unit, len(before))


@dataclass(frozen=True)
class Choice:
    """A method and why it was taken."""

    method: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Activations:
    """Rounded activations of an artifact.

    Attributes:
        scheme: one of `SCHEMES`.
        modules: whose inputs are rounded.
        skip: names that were left alone.
        ranges: module name -> scale and zero point, where they are static.
        batches: how many the ranges were measured on.
    """

    scheme: str
    modules: tuple[str, ...]
    skip: tuple[str, ...]
    ranges: dict[str, tuple[float, int]]
    batches: int


@dataclass(frozen=True)
class Shipped:
    """A finished artifact.

    Attributes:
        model: where it came from, as the user wrote it.
        target: what it is for.
        grid: of its weights, in words.
        choice: the method and why.
        out: the folder.
        file: what is served.
        serve: the command or lines that serve it.
        files: sha256 of every file of the artifact, by name inside `out`.
        certificate: what the runtime loaded and computed.
        weights: one row per quantized weight.
        floats: weights in float, with the reason.
        notes: what else a user of the artifact should know.
        elements, total: numbers in quantized weights and in all.
        losses: before and after; None without data.
        tolerance: increase of the loss that counts as good.
        seconds: wall time of every part.
        peak: largest resident memory of the process so far, in bytes.
        facts: what a reader should know about the source.
        batches: how many were cut from the data, of which some calibrate and the others measure.
        activations: how what goes into the quantized layers is rounded; None where it stays float32.
    """

    model: str
    target: str
    grid: str
    choice: Choice
    out: str
    file: str
    serve: str
    files: dict[str, str]
    certificate: Certificate
    weights: tuple[Weight, ...]
    floats: dict[str, str]
    notes: tuple[str, ...]
    elements: int
    total: int
    losses: Losses | None
    tolerance: float
    seconds: dict[str, float]
    peak: int
    facts: tuple[tuple[str, str], ...]
    batches: int = 0
    activations: Activations | None = None

    @property
    def bits(self) -> float:
        """Mean bits per quantized weight, scales and zero points included."""
        return sum(weight.bits * weight.elements for weight in self.weights) / max(1, sum(weight.elements for weight in self.weights))

    @property
    def within(self) -> bool | None:
        """Whether the loss grew by at most the tolerance; None without data."""
        return None if self.losses is None else self.losses.increase <= self.tolerance
