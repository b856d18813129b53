"""The demo's figures, each with its sentence and its numbers."""

import math
from collections.abc import Callable, Sequence

from stepwell.recipes.digits import BOTH, LOTION, RTN, SEARCHED, STE, TRAINED
from stepwell.report import Axis, Figure, Panel, Series, Table, draw, standalone
from stepwell.train.compare import FLOAT_BITS, FULL_PRECISION
from stepwell.train.story import BINS, DISTANCE_BITS, Story
from stepwell.train.summary import Estimate, Row, chosen

COLOURS = {FULL_PRECISION: 0, RTN: 1, STE: 2, LOTION: 3, BOTH: 4, SEARCHED: 5}
SHOWN = (RTN, SEARCHED, *TRAINED)
LOSS = "held-out loss (nats per image)"


def picture(story: Story) -> str:
    """Return the two loss figures side by side as one SVG file."""
    nearest = _loss_panel(story, lambda row: row.loss, "rounded to nearest")
    randomized = _loss_panel(story, lambda row: row.randomized_loss, "rounded at random")
    return standalone(draw([nearest, randomized], label="Held-out loss against bits per weight, by method", width=4.4, height=3.9))


def losses(story: Story) -> list[Figure]:
    """Return loss against width under nearest and under randomized rounding, on the same axes."""
    nearest, randomized = (lambda row: row.loss), (lambda row: row.randomized_loss)
    ste = row_of(story, STE, 2)
    return [
        Figure(
            "Weights rounded to the nearest grid value",
            draw([_loss_panel(story, nearest)], label="Held-out loss under nearest rounding against bits per weight"),
            f"At 2 bits the order is {ordered(story, 2, nearest)}; with more bits the methods come together at the loss of "
            "full precision (dashed).",
            _loss_table(story, nearest),
        ),
        Figure(
            "Weights rounded at random (randomized rounding)",
            draw([_loss_panel(story, randomized)], label="Held-out loss under randomized rounding against bits per weight"),
            f"At 2 bits the order is {ordered(story, 2, randomized)}: a low loss under one rounding promises nothing about the other "
            f"({STE}: {brief(ste.loss.mean)} to nearest, {brief(ste.randomized_loss.mean)} at random).",
            _loss_table(story, randomized),
        ),
    ]


def sensitivity(story: Story) -> Figure:
    """The same 2-bit networks with latent, nearest and randomized weights."""
    ways: list[tuple[str, Callable[[Row], Estimate]]] = [
        ("not rounded", lambda row: row.latent_loss),
        ("to nearest", lambda row: row.loss),
        ("at random", lambda row: row.randomized_loss),
    ]
    rows = [row_of(story, arm, 2) for arm in (RTN, *TRAINED)]
    series = [
        Series(
            row.arm,
            [index + 0.06 * (COLOURS[row.arm] - 2.5) for index in range(3)],
            [get(row).mean for _, get in ways],
            spread=[get(row).stderr for _, get in ways],
            colour=COLOURS[row.arm],
        )
        for row in rows
    ]
    x = Axis("how the weights are rounded", ticks=[(index, name) for index, (name, _) in enumerate(ways)])
    spread = {row.arm: row.randomized_loss.mean / row.loss.mean for row in rows}
    return Figure(
        "The same 2-bit networks under three roundings",
        draw([Panel(series, x, Axis(LOSS, log=True))], label="Loss of 2-bit networks by rounding"),
        "From nearest to randomized rounding the loss grows "
        + ", ".join(f"{factor:.1f}-fold for {arm}" for arm, factor in spread.items())
        + f". Not rounded at all, {STE} is at {brief(row_of(story, STE, 2).latent_loss.mean)}: its weights are made for one rounding.",
        Table(["method", *(f"{name} (nats)" for name, _ in ways)], [[row.arm, *(pair(get(row)) for _, get in ways)] for row in rows]),
    )


def distances(story: Story) -> Figure:
    """Return where the latent weights lie between two grid values."""
    near = {arm: sum(shares[: BINS // 5]) for arm, shares in story.distances.items()}
    return Figure(
        f"Distance of the weights from the {DISTANCE_BITS}-bit grid",
        draw([_distance_panel(story)], label="Share of weights against distance to the nearest grid value"),
        "Before rounding. Share of weights within a tenth of a step of the grid: "
        + ", ".join(f"{arm} {100 * share:.0f} %" for arm, share in near.items())
        + "; a weight on the grid is the same under every rounding.",
        _distance_table(story),
    )


def gains(story: Story, bits: int, arms: Sequence[str]) -> Figure:
    """Return the paired gains at one width."""
    points = {arm: _paired(story, arm, bits) for arm in arms}
    series = [
        Series("", [index + 0.05 * (k - (len(points[arm]) - 1) / 2) for k in range(len(points[arm]))], points[arm],
               colour=COLOURS[arm], style="points", hollow=True)
        for index, arm in enumerate(arms)
    ]  # fmt: skip
    zero = Series("", [-0.4, len(arms) - 0.6], [0.0, 0.0], style="dashed")
    x = Axis("method", ticks=[(index, arm.replace(", ", ",\n")) for index, arm in enumerate(arms)])
    rows = [row_of(story, arm, bits) for arm in arms]
    table = Table(
        ["method", "mean gain (nats)", "standard errors", *(f"seed {seed} (nats)" for seed in story.config.seeds)],
        [[row.arm, row.gain.mean, round(row.gain.sigmas, 1), *points[row.arm]] for row in rows],
    )
    return Figure(
        f"Gain over RTN at {bits} bits, seed by seed",
        draw([Panel([zero, *series], x, Axis("gain in loss (nats per image)"))], label=f"Paired gains over RTN at {bits} bits"),
        "Mean gain in standard errors: " + ", ".join(f"{row.arm} {row.gain.sigmas:+.1f}" for row in rows) + ".",
        table,
    )


def row_of(story: Story, arm: str, bits: int) -> Row:
    """Return one method's row at one width."""
    return next(row for row in story.rows if (row.arm, row.bits) == (arm, bits))


def ordered(story: Story, bits: int, get: Callable[[Row], Estimate]) -> str:
    """Return the methods from lowest to highest loss, with the losses."""
    rows = sorted((row_of(story, arm, bits) for arm in SHOWN), key=lambda row: get(row).mean)
    return ", ".join(f"{row.arm} ({brief(get(row).mean)})" for row in rows)


def pair(estimate: Estimate) -> str:
    """Return mean ± standard error, the latter with two digits, both with as many decimals."""
    decimals = max(0, 1 - math.floor(math.log10(estimate.stderr))) if estimate.stderr else 4
    return f"{estimate.mean:.{decimals}f} ± {estimate.stderr:.{decimals}f}"


def brief(loss: float) -> str:
    """Return a loss with three digits or so."""
    return f"{loss:.3f}" if loss < 1 else f"{loss:.2f}"


def _loss_panel(story: Story, get: Callable[[Row], Estimate], title: str = "") -> Panel:
    """Return loss against width, on axes that both roundings share."""
    widths = [bits for bits, _ in story.config.grids]
    full = row_of(story, FULL_PRECISION, FLOAT_BITS).loss.mean
    series = [Series(FULL_PRECISION, [-0.3, len(widths) - 0.7], [full, full], style="dashed")]
    for arm in SHOWN:
        estimates = [get(row_of(story, arm, bits)) for bits in widths]
        places = [index + 0.05 * (COLOURS[arm] - 2.5) for index in range(len(widths))]
        means, errors = [e.mean for e in estimates], [e.stderr for e in estimates]
        series.append(Series(arm, places, means, spread=errors, colour=COLOURS[arm]))
    highest = max(max(row.loss.mean, row.randomized_loss.mean) for row in story.rows)
    lowest = min(row.loss.mean for row in story.rows)
    ticks = [(float(index), str(bits)) for index, bits in enumerate(widths)]
    return Panel(series, Axis("bits per weight", ticks=ticks), Axis(LOSS, log=True, limits=(0.8 * lowest, 1.5 * highest)), title)


def _loss_table(story: Story, get: Callable[[Row], Estimate]) -> Table:
    """Return the numbers of a loss figure."""
    widths = [bits for bits, _ in story.config.grids]
    rows = [[arm, *(pair(get(row_of(story, arm, bits))) for bits in widths)] for arm in SHOWN]
    return Table(["method", *(f"{bits} bits (nats)" for bits in widths)], rows, "Mean over seeds ± standard error.")


def _distance_panel(story: Story) -> Panel:
    """Return the histogram of distances to the grid."""
    centres = [(index + 0.5) * 0.5 / BINS for index in range(BINS)]
    series = [Series(arm, centres, shares, colour=COLOURS[arm], style="steps") for arm, shares in story.distances.items()]
    return Panel(series, Axis("distance to the nearest grid value (grid steps)"), Axis("share of weights per bin", percent=True))


def _distance_table(story: Story) -> Table:
    """Return the numbers of the histogram."""
    width = 0.5 / BINS
    rows = [
        [f"{index * width:.3f} to {(index + 1) * width:.3f}", *(f"{100 * shares[index]:.1f} %" for shares in story.distances.values())]
        for index in range(BINS)
    ]
    return Table(["distance (grid steps)", *story.distances], rows)


def _paired(story: Story, arm: str, bits: int) -> list[float]:
    """Return RTN's loss minus a method's, seed by seed, each at its chosen learning rate."""
    pairs = zip(chosen(story.trials, RTN, bits), chosen(story.trials, arm, bits), strict=True)
    return [rtn.nearest.loss - mine.nearest.loss for rtn, mine in pairs]
