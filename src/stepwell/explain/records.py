"""What `measure` returns: frozen records of plain values, so that `dataclasses.asdict` and JSON take them as they are."""

import math
from dataclasses import dataclass

from stepwell.advice.verdict import Verdict
from stepwell.probes.inward import Inward
from stepwell.probes.latent import Latent
from stepwell.probes.plane import Plane
from stepwell.probes.quadratic import Quadratic
from stepwell.probes.rho import Ratio
from stepwell.probes.segment import Segment


@dataclass(frozen=True)
class Rounded:
    """One way of rounding to one grid, without training.

    Attributes:
        method: "RTN", "MSE scales", "curvature scales" or "GPTQ".
        loss: on the measuring batches, with BatchNorm statistics re-estimated for the rounded weights on the others.
        increase: over the float weights.
        low, high: its 90 % interval, from paired differences over batches; half and twice of it for one batch.
        stderr: of the increase, from paired differences over batches; NaN for one batch.
        within: whether the increase is at most the tolerance.
        forward: passes that it took to know, those that calibrated GPTQ among them.
    """

    method: str
    loss: float
    increase: float
    low: float
    high: float
    stderr: float
    within: bool
    forward: int


@dataclass(frozen=True)
class Left:
    """One parameter that stays in float.

    Attributes:
        name: of the parameter; the first one where it is shared.
        elements: how many it has.
        reason: why, in words.
    """

    name: str
    elements: int
    reason: str


@dataclass(frozen=True)
class Damage:
    """What rounding one weight to nearest does.

    Attributes:
        name: of the parameter.
        weights: how many elements it has.
        alone: increase of the loss when only this one is rounded, with BatchNorm statistics re-estimated as for all.
        removed: how much less the loss increases when all are rounded but this one.
    """

    name: str
    weights: int
    alone: float
    removed: float


@dataclass(frozen=True)
class Search:
    """One search for a low-loss grid point near the rounded weights.

    Attributes:
        method: "flip search" or "box QAT".
        before, loss: increase of the loss on the search batches at the rounded weights and at the best point found.
        held_out_before, held_out: the same on the measuring batches, which the search did not see.
        within: whether both increases at the end are at most the tolerance: a proof that such a point exists.
        changed: share of codes that differ from the rounded weights.
        evaluations: forward passes over the search batches, or steps with their evaluations: the budget that was spent.
        history: increase on the search batches, first at the rounded weights.
    """

    method: str
    before: float
    loss: float
    held_out_before: float
    held_out: float
    within: bool
    changed: float
    evaluations: int
    history: tuple[float, ...]


@dataclass(frozen=True)
class Closer:
    """What costs too much to be asked of every grid: where the damage sits, what lies near, which way the gradient points.

    Attributes:
        layers: every quantized weight, the most harmful first.
        gptq_line: the loss along the line from the float weights to those of GPTQ.
        quadratic: what slope and curvature at the float weights predict for rounding.
        searches: for a low-loss grid point near.
        inward: at the rounded weights before training, and after the steps of box QAT.
        latent: where those steps left the weights behind the rounding.
        plane: through float, rounded and trained weights; None where they lie on one line.
    """

    layers: tuple[Damage, ...]
    gptq_line: Segment
    quadratic: Quadratic
    searches: tuple[Search, ...]
    inward: tuple[Inward, Inward]
    latent: Latent
    plane: Plane | None


@dataclass(frozen=True)
class GridReport:
    """One grid.

    Attributes:
        scheme: granularity and rule of the scales, for instance "channel-mse".
        bits: of a code.
        grid: the quantizer, in words.
        rounded: RTN, both scale searches and GPTQ, in this order.
        rho_uniform: a grid-to-basin ratio: above 1 it says that rounding to nearest leaves the tolerance.
        rho_self: the same along the rounding error itself: a tautology, to be read as a margin.
        line: the loss along the line from the float weights to RTN's.
        verdict: what to do.
        closer: a closer look; None where none was taken.
    """

    scheme: str
    bits: int
    grid: str
    rounded: tuple[Rounded, ...]
    rho_uniform: Ratio
    rho_self: Ratio
    line: Segment
    verdict: Verdict
    closer: Closer | None

    @property
    def rho_fn(self) -> float:
        """The grid-to-basin ratio that the verdict is made from: its widths, in three directions, serve every grid."""
        return self.verdict.rho

    @property
    def rtn(self) -> Rounded:
        """Rounding to nearest."""
        return self.rounded[0]

    @property
    def gptq(self) -> Rounded:
        """GPTQ."""
        return self.rounded[-1]


@dataclass(frozen=True)
class Spent:
    """What one part of the measurement took.

    Attributes:
        part: its name.
        forward, backward: passes over all batches; GPTQ's end at the layer that they are for and count as whole ones.
        seconds: of wall time.
    """

    part: str
    forward: float
    backward: float
    seconds: float


@dataclass(frozen=True)
class Explanation:
    """Everything that was measured.

    Attributes:
        tolerance: increase of the loss that still counts as good.
        start, start_stderr: float loss on the measuring batches, and its standard error over batches.
        search_start: float loss on the search batches.
        weights: quantized elements; parameters: all elements.
        layers: how many parameters are quantized.
        floats: the others.
        batches: (for searching and calibrating, for measuring).
        held_out: whether these are different ones; with a single batch they are not.
        settled: whether there is BatchNorm, so that losses after rounding and the damage of single weights are those with re-estimated
            statistics; everything else keeps the float weights'.
        grids: one report per grid, in the order given.
        worth: what such verdicts were worth on other networks, in words.
        notes: what holds for all numbers, in words: first how the batches were divided.
        spent: what each part took.
        effort: "quick", "normal" or "full".
    """

    tolerance: float
    start: float
    start_stderr: float
    search_start: float
    weights: int
    parameters: int
    layers: int
    floats: tuple[Left, ...]
    batches: tuple[int, int]
    held_out: bool
    settled: bool
    grids: tuple[GridReport, ...]
    worth: str
    notes: tuple[str, ...]
    spent: tuple[Spent, ...]
    effort: str

    @property
    def seconds(self) -> float:
        """Wall time of all parts."""
        return math.fsum(one.seconds for one in self.spent)

    @property
    def forward(self) -> float:
        """Forward passes of all parts."""
        return math.fsum(one.forward for one in self.spent)

    @property
    def backward(self) -> float:
        """Backward passes of all parts."""
        return math.fsum(one.backward for one in self.spent)
