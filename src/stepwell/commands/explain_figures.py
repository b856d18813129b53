"""The figures of `stepwell explain`, each with its sentence and its numbers."""

import math
from collections.abc import Callable, Sequence

from stepwell.commands.explain_words import damage, inward, line, named, near, signed
from stepwell.explain.records import Explanation, GridReport
from stepwell.report import Axis, Bars, Figure, HeatMap, Mark, Panel, Series, Table, draw, draw_bars, draw_heat
from stepwell.report.page import Cell

METHODS = {"RTN": 1, "MSE scales": 5, "curvature scales": 3, "GPTQ": 2}  # colours
SHOWN_LAYERS = 12
LOG_FROM = 8.0  # ratio of the largest to the smallest loss from which a logarithmic axis shows more
NAME_LENGTH = 26
LIMIT_FROM = 0.25  # share of the tolerance from which bars reach far enough to be compared with it


def losses(explanation: Explanation, scheme: str, unit: str) -> Figure:
    """Loss against bits, by way of rounding."""
    reports = of(explanation, scheme)
    edge = [-0.3, len(reports) - 0.7]
    limit = explanation.start + explanation.tolerance
    series = [Series("float", edge, [explanation.start] * 2), Series("float + tolerance", edge, [limit] * 2, style="dashed")]
    for index, (method, colour) in enumerate(METHODS.items()):
        rows = [next(one for one in report.rounded if one.method == method) for report in reports]
        places = [k + 0.07 * (index - 1.5) for k in range(len(reports))]
        errors = [0.0 if math.isnan(row.stderr) else row.stderr for row in rows]
        series.append(Series(method, places, [_finite(row.loss) for row in rows], spread=errors, colour=colour))
    every = [one.loss for report in reports for one in report.rounded]
    best = ", ".join(f"{report.bits} bits {_best(report)}" for report in reports)
    table = Table(
        ["bits", "method", f"loss ({unit})", "increase", "standard error", "within tolerance"],
        [
            [report.bits, one.method, one.loss, signed(one.increase), one.stderr, "yes" if one.within else "no"]
            for report in reports
            for one in report.rounded
        ],
        "Standard errors are of the increase, paired over batches.",
        grouped=True,
    )
    return Figure(
        f"Loss after rounding: {scheme}",
        draw([Panel(series, bits_axis(reports), _axis(f"loss ({unit})", every))], label=f"Loss against bits per weight, {scheme}"),
        f"Lowest at {best}; the dashed line is the tolerance of {explanation.tolerance:g} above the float loss.",
        table,
    )


def ratios(explanation: Explanation, scheme: str) -> Figure:
    """Grid-to-basin ratios against bits."""
    reports = of(explanation, scheme)
    kinds: list[tuple[str, Callable[[GridReport], float], int, bool]] = [
        ("rho_fn", lambda report: report.rho_fn, 2, False),
        ("rho_uniform", lambda report: report.rho_uniform.value, 3, False),
        ("rho_self (tautology)", lambda report: report.rho_self.value, 4, True),
    ]
    series = [Series("threshold 1", [-0.3, len(reports) - 0.7], [1.0, 1.0], style="dashed")]
    for name, get, colour, hollow in kinds:
        series.append(Series(name, list(range(len(reports))), [_finite(get(report)) for report in reports], colour=colour, hollow=hollow))
    right = sum((report.rho_fn > 1) != report.rtn.within for report in reports)
    rows: list[list[Cell]] = [
        [report.bits, *(get(report) for _, get, _, _ in kinds), signed(report.rtn.increase), "no" if report.rtn.within else "yes"]
        for report in reports
    ]
    return Figure(
        f"Grid-to-basin ratio: {scheme}",
        draw(
            [Panel(series, bits_axis(reports), Axis("rounding distance (basin widths)", log=True))],
            label=f"Grid-to-basin ratios against bits per weight, {scheme}",
        ),
        f"Above 1 a ratio says that rounding leaves the basin; rho_fn is right about RTN in {right} of {len(reports)} cases here. "
        "rho_self is above 1 where rounding fails by its definition: a margin, not a prediction.",
        Table(["bits", *(name for name, *_ in kinds), "RTN increase", "RTN fails"], rows, "Gray zone in other networks: 0.77 to 1.7."),
    )


def lines(explanation: Explanation, scheme: str, unit: str) -> Figure:
    """The loss along the line from float to rounded weights."""
    reports = of(explanation, scheme)
    limit = explanation.start + explanation.tolerance
    positions = reports[0].line.positions
    series = [Series("float + tolerance", [positions[0], positions[-1]], [limit, limit], style="dashed")]
    for index, report in enumerate(reports):
        values = [_finite(value) for value in report.line.losses]
        series.append(Series(f"{report.bits} bits", positions, values, colour=index % 5 + 1))
    for report in reports:
        if report.closer is not None:
            values = [_finite(value) for value in report.closer.gptq_line.losses]
            series.append(Series(f"{report.bits} bits, to GPTQ", positions, values, colour=0, style="dashed"))
    every = [value for report in reports for value in report.line.losses]
    columns: dict[str, Sequence[float]] = {f"{report.bits} bits": report.line.losses for report in reports}
    columns |= {f"{report.bits} bits, GPTQ": report.closer.gptq_line.losses for report in reports if report.closer is not None}
    rows: list[list[Cell]] = [[a, *(values[k] for values in columns.values())] for k, a in enumerate(positions)]
    return Figure(
        f"Along the line from float to rounded: {scheme}",
        draw(
            [Panel(series, Axis("position (0 float, 1 rounded)"), _axis(f"loss ({unit})", every))],
            label=f"Loss along the line from float to rounded weights, {scheme}",
        ),
        "How the loss grows: " + "; ".join(line(report) for report in reports if not report.rtn.within or report is reports[-1]) + ".",
        Table(["position", *columns], rows),
    )


def layers(report: GridReport, explanation: Explanation, unit: str) -> Figure:
    """Which weights carry the damage."""
    assert report.closer is not None
    worst = report.closer.layers[:SHOWN_LAYERS]
    groups = [
        Bars("rounded alone", [_finite(one.alone) for one in worst]),
        Bars("taken off if left in float", [_finite(one.removed) for one in worst], 2),
    ]
    rows: list[list[Cell]] = [[one.name, one.weights, one.alone, one.removed] for one in report.closer.layers]
    largest = max((bar for group in groups for bar in group.values if math.isfinite(bar)), default=0.0)
    drawn = draw_bars(
        [shortened(one.name) for one in worst],
        groups,
        axis=Axis(f"change of the loss ({unit})"),
        label="Damage by weight",
        limit=(explanation.tolerance, "tolerance") if largest > LIMIT_FROM * explanation.tolerance else None,
    )
    shown = "" if len(worst) == len(rows) else f" The {len(worst)} worst of {len(rows)} are shown."
    return Figure(
        f"Which weights carry the damage: {named(report, explanation)}",
        drawn,
        damage(report) + shown,
        Table(["weight", "elements", "alone", "taken off if left in float"], rows),
    )


def searches(report: GridReport, explanation: Explanation, unit: str) -> Figure:
    """What the searches near the rounded weights found."""
    assert report.closer is not None
    found = report.closer.searches
    names = ["rounded to nearest", *(one.method for one in found)]
    seen = [found[0].before, *(one.loss for one in found)]
    unseen = [found[0].held_out_before, *(one.held_out for one in found)]
    rows: list[list[Cell]] = [
        [
            one.method, one.before, one.loss, one.held_out_before, one.held_out, f"{one.changed:.2%}",
            f"{one.evaluations} {'steps' if one.method == 'box QAT' else 'evaluations'}", "found" if one.within else "not found",
        ]
        for one in found
    ]  # fmt: skip
    columns = ["search", "before", "after", "held out, before", "held out, after", "codes moved", "budget", "within tolerance on both"]
    bars = [Bars("batches that the search saw", [_finite(value) for value in seen], 0)]
    if explanation.held_out:
        bars.insert(0, Bars("held-out batches", [_finite(value) for value in unseen], 2))
    else:
        columns, rows = [*columns[:3], *columns[5:]], [[*row[:3], *row[5:]] for row in rows]
    return Figure(
        f"Low-loss grid points near: {named(report, explanation)}",
        draw_bars(
            names,
            bars,
            axis=Axis(f"increase of the loss ({unit})"),
            label="Increase of the loss before and after searches",
            limit=(explanation.tolerance, "tolerance"),
        ),
        near(report, explanation),
        Table(columns, rows),
    )


def gradients(report: GridReport, explanation: Explanation) -> Figure:
    """Which way the gradient points."""
    assert report.closer is not None
    points = report.closer.inward
    names = ["rounded weights", f"after {report.closer.searches[1].evaluations} steps"]
    rows: list[list[Cell]] = [
        [name, one.cosine, one.latent_cosine, one.random, one.projection, one.loss, one.latent_loss, "yes" if one.outside else "no"]
        for name, one in zip(names, points, strict=True)
    ]
    columns = ["where", "at deployed weights", "at latent weights", "random level", "projection", "deployed loss", "latent loss", "outside"]
    return Figure(
        f"Does descent lead back: {named(report, explanation)}",
        draw_bars(
            names,
            [
                Bars("at deployed weights", [_finite(one.cosine) for one in points], 1),
                Bars("at latent weights", [_finite(one.latent_cosine) for one in points], 4),
            ],
            axis=Axis("cosine of descent and the way back (1)"),
            label="Cosine of the descent direction with the way back to the float weights",
            limit=(points[0].random, "random level"),
        ),
        inward(report),
        Table(columns, rows),
    )


def slices(report: GridReport, explanation: Explanation) -> list[Figure]:
    """The 2-D slice through float, rounded and trained weights: as it is, and rounded to the grid at every point."""
    assert report.closer is not None
    plane, tolerance = report.closer.plane, explanation.tolerance
    if plane is None:
        return []
    ends = (0.5, 1.0, 2.0, 5.0, 10.0)
    names = [f"up to {signed(end * tolerance)}" for end in ends] + [f"above {signed(ends[-1] * tolerance)}"]
    marks = [Mark("float", 0.0, 0.0), Mark("rounded", 1.0, 0.0), Mark("trained", min(max(plane.mark, -0.5), 1.5), 1.0)]
    figures = []
    for title, values, area, words in (
        ("weights as they are", plane.losses, plane.area, "The part of the square within tolerance"),
        (
            "weights rounded to the grid",
            plane.rounded,
            plane.rounded_area,
            "Where every point is rounded to the grid before it is evaluated, the part within tolerance",
        ),
    ):
        grown = [[value - plane.start for value in row] for row in values]
        rows: list[list[Cell]] = [[y, *row] for y, row in zip(plane.positions, values, strict=True)]
        figures.append(
            Figure(
                f"A slice of the loss, {title}: {named(report, explanation)}",
                draw_heat(
                    HeatMap(plane.positions, plane.positions, grown, [end * tolerance for end in ends], names, marks),
                    x=Axis("towards the rounded weights (rounding errors)"),
                    y=Axis("across, towards trained weights (1 = trained)"),
                    label=f"Increase of the loss over a plane, {title}",
                ),
                f"{words} is {area:.0%} of it; the ways to the rounded and to the trained weights have a cosine of {plane.cosine:.2f}.",
                Table(["across \\ towards", *(f"{x:.2f}" for x in plane.positions)], rows, "Losses."),
            )
        )
    return figures


def of(explanation: Explanation, scheme: str) -> list[GridReport]:
    """Return the grids of a scheme, most bits first."""
    return sorted((report for report in explanation.grids if report.scheme == scheme), key=lambda report: -report.bits)


def bits_axis(reports: Sequence[GridReport]) -> Axis:
    """Return the axis on which bit widths stand side by side."""
    return Axis("bits per weight", ticks=[(float(k), str(report.bits)) for k, report in enumerate(reports)])


def shortened(name: str) -> str:
    """Return a parameter's name short enough for an axis, its end rather than its beginning; the table has it whole.

    >>> shortened("model.layers.11.self_attn.q_proj.weight")
    '…ayers.11.self_attn.q_proj'
    """
    name = name.removesuffix(".weight")
    return name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"


def _best(report: GridReport) -> str:
    best = min(report.rounded, key=lambda one: one.loss)
    return f"{best.method} ({signed(best.increase)})"


def _axis(label: str, values: Sequence[float]) -> Axis:
    """Return a loss axis, logarithmic where losses differ by a large factor."""
    finite = [value for value in values if math.isfinite(value)]
    return Axis(label, log=bool(finite) and min(finite) > 0 and max(finite) > LOG_FROM * min(finite))


def _finite(value: float) -> float:
    """Return a value that can be drawn; what is infinite leaves a gap."""
    return value if math.isfinite(value) else math.nan
