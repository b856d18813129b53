"""What `stepwell quantize` and `verify` say in sentences, each made from the numbers, for the page and for the terminal."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwell.export.certificate import Certificate
    from stepwell.ship.records import Shipped

KEPT, DIFFERS, UNKNOWN = "equal", "DIFFER", "not compared"


def headline(shipped: "Shipped") -> str:
    """Say what was made."""
    share = shipped.elements / shipped.total
    return (
        f"{shipped.elements:,} of {shipped.total:,} weights ({share:.1%}) at {shipped.bits:.3g} bits each, scales included, "
        f"by {shipped.choice.method}; {len(shipped.floats)} stayed in float."
    )


def inputs(shipped: "Shipped") -> list[str]:
    """Say how activations are rounded."""
    from stepwell.ship.records import SCHEMES

    made = shipped.activations
    if made is None:
        return []
    seen = f", measured on {made.batches} batches" if made.ranges else ""
    return [f"What goes into {len(made.modules)} layers is rounded to {SCHEMES[made.scheme]}{seen}."]


def reasons(shipped: "Shipped") -> list[str]:
    """Say why this method."""
    return [] if shipped.choice.why == ("asked for",) else [f"Why {shipped.choice.method}: {'; '.join(shipped.choice.why)}."]


def lost(shipped: "Shipped") -> list[str]:
    """Say what the loss did."""
    losses = shipped.losses
    if losses is None:
        return ["No data was given: what the model loses is not known. Run it again with --data, or `stepwell verify` with it."]
    error = "" if math.isnan(losses.stderr) else f" ± {losses.stderr:.2g}"
    verdict = "within" if shipped.within else "NOT WITHIN"
    return [
        f"Loss on {losses.batches} held-out batches: {losses.before:.4f} in float, {losses.after:.4f} quantized, "
        f"{losses.increase:+.4f}{error} {losses.unit}; {verdict} the tolerance of {shipped.tolerance:g}."
    ]


def compared(certificate: "Certificate") -> list[str]:
    """Say what the runtime loaded and computed."""
    words = ", ".join(
        f"{part} {word(getattr(certificate, f'{part}_equal'))}" for part in ("codes", "scales", "values")
    )  # fmt: skip
    lines = [f"{'Passed' if certificate.passed else 'NOT PASSED'}: loaded by {certificate.runtime} {certificate.version}: {words}."]
    if not certificate.inputs:
        return [*lines, "Outputs were not compared: nothing was run."]
    classes = ""
    if certificate.kl is not None:
        classes = f"; KL {certificate.kl:.1e} nats per row, the same first choice in {certificate.top1_agreement:.2%}"
    left = f", of which {certificate.remainder:.1e} is not explained by what is listed here" if certificate.causes else ""
    allowed = f"allowed are {certificate.tolerance:.1e}"
    lines.append(f"Outputs differ by {certificate.max_relative_error:.1e} of the largest{left}; {allowed}{classes}.")
    return [*lines, *(f"Cause: {cause.name} ({cause.what}): {cause.before:.1e} becomes {cause.after:.1e}." for cause in certificate.causes)]


def word(equal: bool | None) -> str:
    """Return a comparison in a word."""
    return UNKNOWN if equal is None else KEPT if equal else DIFFERS
