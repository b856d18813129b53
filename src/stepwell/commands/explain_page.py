"""The page of `stepwell explain`: every sentence with a number in it is made from the numbers."""

import math
import platform
from typing import TYPE_CHECKING

from stepwell.commands.explain_figures import gradients, layers, lines, losses, ratios, searches, slices
from stepwell.commands.explain_words import by, counted, decisive, headline, named, near, signed, verdict, worst
from stepwell.explain.records import Explanation, GridReport
from stepwell.explain.sources import Subject
from stepwell.report import Finding, Page, Section, Table

if TYPE_CHECKING:
    from stepwell.report.page import Cell

MOST_FINDINGS, MOST_LAYERS = 6, 8


def page(subject: Subject, explanation: Explanation) -> Page:
    """Return the report."""
    return Page(
        title=f"Rounding {subject.name}: what fails, why, and what will work",
        lead=_lead(explanation),
        findings=_findings(explanation),
        sections=[
            _verdicts(explanation),
            _rounding(subject, explanation),
            _basin(subject, explanation),
            *(_closer(subject, explanation, report) for report in explanation.grids if report.closer is not None),
            _method(explanation),
        ],
        facts=[*subject.facts, *_versions(), ("tolerance", f"{explanation.tolerance:g} ({subject.unit})"), ("mode", explanation.effort)],
    )


def _lead(explanation: Explanation) -> str:
    """Say what was measured, in two sentences."""
    search, measured = explanation.batches
    data = (
        f"on {counted(measured, 'batch', 'batches')}; {counted(search, 'other')} calibrated GPTQ and guided the searches"
        if explanation.held_out
        else "on the one batch that was given, which calibrated GPTQ and guided the searches as well"
    )
    return (
        f"{explanation.weights:,} of {explanation.parameters:,} weights, in {counted(explanation.layers, 'parameter')}, were rounded to "
        f"{counted(len(explanation.grids), 'grid')}. The float loss is {explanation.start:.4g} {data}. "
        f"A method is enough if the loss grows by at most {explanation.tolerance:g}."
    )


def _findings(explanation: Explanation) -> list[Finding]:
    """Return the headlines: what to do at every width, then what the closer look found."""
    reports = list(explanation.grids)
    if len(reports) > MOST_FINDINGS:
        reports = [report for report in reports if report.verdict.method != "RTN"][:MOST_FINDINGS] or reports[-1:]
    found = [
        Finding(
            f"{named(report, explanation)}: {headline(report)}",
            verdict(report),
            "good" if report.verdict.method in ("RTN", "GPTQ", "train") else "bad" if report.verdict.method == "not reachable" else "plain",
        )
        for report in reports
    ]
    for report in explanation.grids:
        if report.closer is not None and not report.rtn.within:
            within = any(one.within for one in report.closer.searches)
            state = "found near" if within else "none found near"
            found.append(Finding(f"{named(report, explanation)}: {state}", near(report, explanation), "good" if within else "plain"))
            found.append(Finding(f"{named(report, explanation)}: where it hurts", worst(report)))
    return found


def _verdicts(explanation: Explanation) -> Section:
    """What to do, with reasons, cost and what such verdicts have been worth."""
    rows: list[list[Cell]] = []
    why: list[list[Cell]] = []
    for report in explanation.grids:
        one, known = report.verdict, decisive(report)
        rows.append(
            [
                named(report, explanation), headline(report), by(known.method),
                signed(known.increase), f"{known.low:.3g} to {known.high:.3g}",
                by(one.safe or "nothing"), "not judged" if math.isnan(one.hit_rate) else f"{one.hit_rate:.0%}",
                one.cost.forward,
            ]
        )  # fmt: skip
        why.append([named(report, explanation), "; ".join(one.reasons) + "."])
    columns = ["grid", "verdict", "looked at", "expected increase", "interval", "surely enough", "right elsewhere", "forward passes"]
    return Section(
        "What to do",
        paragraphs=[explanation.worth],
        tables=[
            Table(columns, rows, "“Surely enough” is the cheapest method whose whole interval is within tolerance."),
            Table(["grid", "why"], why, "The reasons."),
        ],
    )


def _rounding(subject: Subject, explanation: Explanation) -> Section:
    """Losses after every way of rounding."""
    return Section(
        "What each way of rounding loses",
        paragraphs=[
            "RTN rounds to nearest with the scheme's own scales. Scales can be searched for the smallest squared error, plain or weighted "
            "by the curvature of the loss. GPTQ lets every column make up for the errors of those before it.",
        ],
        figures=[losses(explanation, scheme, subject.unit) for scheme in _schemes(explanation)],
    )


def _basin(subject: Subject, explanation: Explanation) -> Section:
    """How far rounding moves the weights, and how the loss grows on the way."""
    return Section(
        "How far rounding goes, and where the loss rises",
        paragraphs=[
            "The basin is the set of weights whose loss is within tolerance. A grid-to-basin ratio is the distance that rounding moves the "
            "weights, in widths of the basin: measured along random directions that scale with the weights (rho_fn, the mean of three) or "
            "along uniform noise of the grid's size (rho_uniform). Around 1 it cannot tell: between 0.77 and 1.7 rounding has been seen to "
            "fail and to work.",
            *(
                [
                    "BatchNorm keeps the float weights' statistics here. The losses above are those with statistics re-estimated for the "
                    "rounded weights, so rounding may work where a ratio or a line says that it fails."
                ]
                if explanation.settled
                else []
            ),
        ],
        figures=[
            figure for scheme in _schemes(explanation) for figure in (ratios(explanation, scheme), lines(explanation, scheme, subject.unit))
        ],
    )


def _closer(subject: Subject, explanation: Explanation, report: GridReport) -> Section:
    """Where the damage sits, what lies near, which way the gradient points."""
    assert report.closer is not None
    why = (
        "rounding works here; nothing coarser was asked for"
        if report.rtn.within
        else "the widest grid of its scheme on which rounding fails"
    )
    if explanation.effort == "full" and not report.rtn.within:
        why = "rounding fails here"
    paragraphs = [f"A closer look at {report.scheme}, {report.bits} bits: {why}."]
    if not report.rtn.within:
        ratio = report.closer.quadratic.ratio
        paragraphs.append(
            f"The second derivatives at the float weights predict {signed(report.closer.quadratic.predicted)} for rounding, and "
            f"{signed(report.closer.quadratic.actual)} came: a method that sees only them {'under' if ratio < 1 else 'over'}estimates "
            f"the damage by a factor of {max(ratio, 1 / ratio) if ratio > 0 else float('inf'):.2g}."
        )
    behind = report.closer.latent
    paragraphs.append(
        f"After {report.closer.searches[1].evaluations} steps of training inside the box the deployed weights stand at "
        f"{signed(behind.loss - explanation.start)} and the latent ones behind them at {signed(behind.latent_loss - explanation.start)}; "
        f"{behind.changed:.2%} of the codes have moved. Clipping the float weights to the grid's range alone costs "
        f"{signed(behind.clipped_loss - explanation.start)}."
    )
    if explanation.settled:
        paragraphs.append("But for the damage of single weights, BatchNorm keeps the float weights' statistics in this section.")
    ranked: list[list[Cell]] = [
        [place, one.name, one.weights, signed(one.alone), signed(one.removed)]
        for place, one in enumerate(report.closer.layers[:MOST_LAYERS], 1)
    ]
    return Section(
        f"A closer look: {report.scheme}, {report.bits} bits",
        paragraphs=paragraphs,
        figures=[
            layers(report, explanation, subject.unit),
            searches(report, explanation, subject.unit),
            *slices(report, explanation),
            gradients(report, explanation),
        ],
        tables=[
            Table(["rank", "weight", "elements", "increase if rounded alone", "taken off if left in float"], ranked, "The worst weights.")
        ],
    )


def _method(explanation: Explanation) -> Section:
    """What was measured how, and what it took."""
    spent: list[list[Cell]] = [
        [one.part, round(one.forward, 1), round(one.backward, 1), round(one.seconds, 2)] for one in explanation.spent
    ]
    spent.append(["all", round(explanation.forward, 1), round(explanation.backward, 1), round(explanation.seconds, 2)])
    return Section(
        "How it was measured",
        paragraphs=[
            "The model was in evaluation mode, its scales frozen while weights moved over the grid. A forward pass is one look at every "
            "batch that was used, and each counts the same, whatever its size; GPTQ's passes end at the layer that they are for and count "
            "as whole ones.",
            *explanation.notes,
        ],
        tables=[
            Table(["part", "forward passes", "backward passes", "seconds"], spent, "What it took.", strong=[len(spent) - 1]),
            *_floats(explanation),
        ],
    )


def _floats(explanation: Explanation) -> list[Table]:
    """Return which parameters stay in float, and why, behind a fold; models have hundreds of them."""
    if not explanation.floats:
        return []
    rows: list[list[Cell]] = [[one.name, one.elements, one.reason] for one in explanation.floats]
    caption = f"The {counted(len(rows), 'parameter')} that stayed in float, and why"
    return [Table(["parameter", "elements", "why"], rows, caption, folded=True)]


def _schemes(explanation: Explanation) -> list[str]:
    return list(dict.fromkeys(report.scheme for report in explanation.grids))


def _versions() -> list[tuple[str, str]]:
    """Return what the numbers depend on."""
    from importlib.metadata import version

    return [(name, version(name)) for name in ("stepwell", "torch")] + [
        ("machine", f"{platform.machine()}, Python {platform.python_version()}")
    ]
