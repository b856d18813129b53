"""What `stepwell explain` prints: a table per scheme that fits 80 columns, and what it took."""

from stepwell.advice.reasons import HOW
from stepwell.commands.explain_words import aligned, decisive, headline, measured, near, searched, worst
from stepwell.explain.records import Explanation, GridReport


def summary(report: GridReport) -> dict[str, object]:
    """Return one grid's most important numbers, for machines."""
    verdict = report.verdict
    return {
        "scheme": report.scheme,
        "bits": report.bits,
        **{method.lower().replace(" ", "_"): one for method, one in ((one.method, one.increase) for one in report.rounded)},
        "rho_fn": report.rho_fn,
        "verdict": verdict.method,
        "predicted": verdict.predicted,
        "low": verdict.low,
        "high": verdict.high,
        "hit_rate": verdict.hit_rate,
    }


def summaries(explanation: Explanation) -> list[tuple[str, list[dict[str, object]], str]]:
    """Return title, rows and note of one table per scheme."""
    tables = []
    for scheme in dict.fromkeys(report.scheme for report in explanation.grids):
        mine = [report for report in explanation.grids if report.scheme == scheme]
        title = f"{scheme}: increase of the loss over {explanation.start:.4g} in float; tolerance {explanation.tolerance:g}"
        tables.append((title, [_row(report, explanation.tolerance) for report in mine], _note(mine, explanation)))
    return tables


def cost(explanation: Explanation) -> list[str]:
    """Return what verdicts are worth, what holds for all numbers, and what everything took."""
    took = f"{explanation.forward:.0f} forward and {explanation.backward:.0f} backward passes, {explanation.seconds:.1f} s."
    return [explanation.worth, *explanation.notes, took]


def _row(report: GridReport, tolerance: float) -> dict[str, object]:
    searched = min(one.increase for one in report.rounded[1:3])
    known = decisive(report)
    low, high = (aligned(end, tolerance, sign="-") for end in (known.low, known.high))
    return {
        "bits": report.bits,
        "RTN": aligned(report.rtn.increase, tolerance),
        "searched": aligned(searched, tolerance),
        "GPTQ": aligned(report.gptq.increase, tolerance),
        "rho": f"{report.rho_fn:.2f}",
        "verdict": headline(report),
        "expected": f"{aligned(known.increase, tolerance)} ({low} to {high})" if measured(report) else "unknown",
    }


def _note(reports: list[GridReport], explanation: Explanation) -> str:
    """Return what the closer look says."""
    words = [
        "searched: the better of scales searched without and with curvature; expected: of the verdict's method, or of the one that is in "
        "doubt, with its interval."
    ]
    if any("train" in (report.verdict.method, report.verdict.safe) for report in reports):
        words.append(f"train: {HOW.removeprefix('train ')}")
    if any(headline(report).endswith("or less") for report in reports):
        words.append("or less: this method is surely enough, a cheaper one may be.")
    for report in reports:
        if searched(report):
            words.append(f"{report.bits} bits:{searched(report)}")
        if report.closer is not None:
            words += [f"{report.bits} bits: {worst(report)}", f"{report.bits} bits: {near(report, explanation)}"]
    return "\n".join(words)
