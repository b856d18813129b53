"""What `stepwell predict` says in tables and in JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwell.theory import Trajectory
    from stepwell.theory.forecast import Forecast

POINTS = 9


def shown(told: "Forecast") -> list[int]:
    """Return the indices of the times that are printed: the start, then evenly in log t."""
    last = len(told.curve.t) - 1
    return [0, *(last * k // POINTS for k in range(2, POINTS + 1))]


def points(told: "Forecast", simulated: "Trajectory | None") -> list[dict[str, object]]:
    """Return the curve at the printed times."""
    rows: list[dict[str, object]] = [
        {
            "t": float(told.curve.t[k]),
            "error": float(told.curve.error[k]),
            "unquantized": float(told.unquantized.error[k]),
            "unquantized_and_rounded": float(told.rounded.error[k]),
        }
        for k in shown(told)
    ]
    if simulated is not None:
        for k, row in enumerate(rows):
            row["simulated"] = float(simulated.error[k])
            row["standard_error"] = None if simulated.stderr is None else float(simulated.stderr[k])
    return rows


def findings(told: "Forecast", simulated: "Trajectory | None") -> list[dict[str, object]]:
    """Return the headlines as rows of a table."""
    p, e, s, curve = told.plateau, told.estimate, told.stability, told.curve
    lowest = int(curve.error.argmin())
    why = f"mechanism: {e.mechanism}" + (f", estimated length {e.l10:.3g}" if e.mechanism != "none" else f", {e.reason}")
    rows = [
        ("plateau length L10", p.l10, why),
        ("sharpness (L90 - L10) / L10", p.sharpness, f"L90 = {p.l90:.4g}; below 1 is sharp"),
        ("lowest error", float(curve.error[lowest]), f"at t = {curve.t[lowest]:.4g}"),
        ("end of training", told.end.error if told.end else None, _end(told)),
        ("unquantized end", told.unquantized_end.error_latent, "the same training with float weights"),
        ("rounded end (PTQ)", told.unquantized_end.error, "float training, then rounding to nearest"),
        ("linear threshold", s.linear_threshold, _linear(told)),
        ("status", curve.status, curve.message),
    ]
    if simulated is not None:
        gap = float(abs(simulated.error - curve.error[shown(told)]).max())
        rows.append(("largest distance to simulation", gap, "falls as 1 / sqrt(dimension)"))
    return [{"quantity": name, "value": value, "remark": remark} for name, value, remark in rows]


def _end(told: "Forecast") -> str:
    if told.end is None:
        return "frozen weights remember their path: no end that is independent of the start"
    return "error after infinitely many steps" if told.end.status == "ok" else f"{told.end.status}: {told.end.message}"


def _linear(told: "Forecast") -> str:
    s, lr = told.stability, told.problem.lr
    if s.linear_stable:
        return f"lr = {lr:g} is below it: unquantized training converges"
    return f"lr = {lr:g} is beyond it: unquantized training diverges, " + ("quantized training does not" if s.stable else "this one too")


def record(told: "Forecast", simulated: "Trajectory | None") -> dict[str, object]:
    """Return everything for machines."""
    everything: dict[str, object] = {
        "problem": asdict(told.problem),
        "t": told.curve.t,
        "error": told.curve.error,
        "error_latent": told.curve.error_latent,
        "error_randomized": told.curve.error_randomized,
        "unquantized": told.unquantized.error,
        "unquantized_and_rounded": told.rounded.error,
        "status": told.curve.status,
        "message": told.curve.message,
        "plateau": asdict(told.plateau),
        "estimate": told.estimate._asdict(),
        "end": None if told.end is None else asdict(told.end),
        "unquantized_end": asdict(told.unquantized_end),
        "stability": told.stability._asdict(),
    }
    if simulated is not None:
        everything["simulation"] = {"t": simulated.t, "error": simulated.error, "stderr": simulated.stderr, "status": simulated.status}
    return everything
