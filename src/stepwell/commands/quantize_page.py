"""The page of a certificate: every sentence with a number in it is made from the numbers."""

import math
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from stepwell.commands.quantize_words import compared, headline, inputs, lost, reasons, word
from stepwell.report import Axis, Bars, Figure, Finding, Page, Section, Table, draw_bars

if TYPE_CHECKING:
    from stepwell.report.page import Cell
    from stepwell.ship.records import Shipped

MOST_BARS = 16


def page(shipped: "Shipped") -> Page:
    """Return the certificate of an artifact as a page."""
    return Page(
        title=f"{shipped.model} for {shipped.target}",
        lead=headline(shipped),
        findings=_findings(shipped),
        sections=[_serving(shipped), _method(shipped), _weights(shipped), _runtime(shipped), _files(shipped)],
        facts=[
            *shipped.facts, ("target", shipped.target), ("grid", shipped.grid), ("stepwell", version("stepwell")),
            ("torch", version("torch")), ("machine", f"{platform.machine()}, Python {platform.python_version()}"),
        ],
    )  # fmt: skip


def _findings(shipped: "Shipped") -> list[Finding]:
    """Return the headlines: does it run as trained, what is lost, how small is it."""
    checked, losses = shipped.certificate, shipped.losses
    found = [Finding("passed" if checked.passed else "not passed", compared(checked)[0], "good" if checked.passed else "bad")]
    if checked.inputs:
        state: Literal["good", "bad"] = "good" if checked.remainder <= checked.tolerance else "bad"
        found.append(Finding(f"{checked.remainder:.1e}", " ".join(compared(checked)[1:]), state))
    if losses is not None:
        found.append(Finding(f"{losses.increase:+.2g}", lost(shipped)[0], "good" if shipped.within else "bad"))
    share = shipped.elements / shipped.total
    found.append(Finding(f"{shipped.bits:.3g} bits", f"per quantized weight, scales included; {share:.1%} of all weights are quantized."))
    return found


def _serving(shipped: "Shipped") -> Section:
    """How it is served."""
    return Section("Serve it", tables=[Table(["command"], [[line.replace("    ", "  ")] for line in shipped.serve.splitlines()])])


def _method(shipped: "Shipped") -> Section:
    """How the weights came to the grid, and what it took."""
    spent: list[list[Cell]] = [[part, round(seconds, 2)] for part, seconds in shipped.seconds.items()]
    why = reasons(shipped) or [f"The method {shipped.choice.method} was asked for."]
    memory = f"The process held at most {shipped.peak / 1e6:,.0f} MB at any time, loading it again and comparing included."
    return Section(
        "How the weights came to the grid",
        paragraphs=[*why, *inputs(shipped), *lost(shipped), *shipped.notes, memory],
        tables=[Table(["part", "seconds"], spent, "What it took.")],
    )


def _weights(shipped: "Shipped") -> Section:
    """Every weight: its grid, and how far it was moved."""
    rows: list[list[Cell]] = [
        [one.name, "x".join(map(str, one.shape)), one.grid, one.bits, one.error, one.method] for one in shipped.weights
    ]
    tables = [Table(["weight", "shape", "grid", "bits", "relative error", "note"], rows, "Quantized weights.")]
    if shipped.floats:
        tables.append(Table(["weight", "why it is in float"], [[name, why] for name, why in shipped.floats.items()], "Weights in float."))
    worst = sorted(shipped.weights, key=lambda one: -one.error)[:MOST_BARS]
    figures = []
    if worst:
        drawing = draw_bars(
            [one.name for one in worst], [Bars("relative error", [one.error for one in worst])],
            axis=Axis("distance from the float weight, relative"), label="Relative error by weight", width=7.5,
        )  # fmt: skip
        largest = worst[0]
        meaning = f"{largest.name} was moved most, by {largest.error:.1%} of its length" + (
            f"; the {len(worst)} largest of {len(shipped.weights)} are shown." if len(worst) < len(shipped.weights) else "."
        )
        figures = [
            Figure(
                "How far each weight was moved", drawing, meaning, Table(["weight", "relative error"], [[w.name, w.error] for w in worst])
            )
        ]
    return Section("Weights", figures=figures, tables=tables)


def _runtime(shipped: "Shipped") -> Section:
    """What the runtime loaded and computed."""
    checked = shipped.certificate
    rows: list[list[Cell]] = [
        [one.name, one.nodes, one.grid, word(one.codes_equal), word(one.scales_equal), word(one.values_equal), one.note]
        for one in checked.layers
    ]
    causes: list[list[Cell]] = [[one.name, one.what, one.before, one.after] for one in checked.causes]
    tables = [Table(["weight", "places", "grid in the file", "codes", "scales", "values", "note"], rows, "What was loaded.")]
    if causes:
        tables.append(
            Table(["cause", "taken away by", "difference before", "after"], causes, "What the difference of the outputs comes from.")
        )
    noise = ""
    if checked.inputs and math.isfinite(checked.noise):
        noise = (
            f"One order of float32 sums moves the outputs by {checked.noise:.1e}; allowed is four times that, and 2e-6 at least. "
            f"Inputs: {', '.join(checked.inputs)}."
        )
    return Section("What the runtime loaded and computed", paragraphs=[*compared(checked), *([noise] if noise else [])], tables=tables)


def _files(shipped: "Shipped") -> Section:
    """Every file by its digest."""
    return Section(
        "Files",
        tables=[Table(["file", "sha256"], [[name, digest] for name, digest in shipped.files.items()], "`stepwell verify` checks these.")],
    )
