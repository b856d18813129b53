"""The figures of `stepwell predict`: a learning curve with what it is compared with, and a phase diagram. Each has its sentence."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from stepwell.theory.plateau import FALLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stepwell.theory import Problem, Sweep, Trajectory
    from stepwell.theory.forecast import Forecast

METHODS = {"ste": "STE", "clipped_ste": "clipped STE", "lotion": "LOTION", "ptq": "PTQ"}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.hashsalt": "stepwell",
    "svg.fonttype": "none",
}
WRAP = 96


def name(problem: "Problem") -> str:
    """Return the setting in words."""
    inputs = f", inputs {problem.inputs}" if problem.inputs else ""
    return f"{METHODS[problem.method]}, weights {problem.weights}{inputs}, lr {problem.lr:g}, noise {problem.label_noise:g}"


def draw_curve(told: "Forecast", simulated: "Trajectory | None", path: Path) -> str:
    """Draw the learning curve and return the sentence that says what it means."""
    t = told.curve.t
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = canvas.add_subplot()
        axes.plot(t[1:], told.unquantized.error[1:], color="#888888", linestyle="--", label="unquantized")
        axes.plot(t[1:], told.rounded.error[1:], color="#d08020", linestyle="-.", label="unquantized, then rounded")
        axes.plot(t[1:], told.curve.error[1:], color="#1060a0", linewidth=2, label=METHODS[told.problem.method])
        if told.end is not None and np.isfinite(told.end.error):
            axes.axhline(told.end.error, color="#1060a0", linewidth=0.8, linestyle=":", label="end of training")
        if simulated is not None:
            spread = None if simulated.stderr is None else simulated.stderr[1:]
            axes.errorbar(simulated.t[1:], simulated.error[1:], spread, color="black", fmt="o", markersize=4, capsize=2, label="simulation")
        if np.isfinite(told.plateau.l10):
            axes.axvspan(t[1], told.plateau.l10, color="#1060a0", alpha=0.08)
        ceiling = 1.1 * max(float(np.max(told.curve.error)), float(told.curve.error[0]))
        axes.set(xscale="log", xlim=(t[1], t[-1]), ylim=(0, ceiling), xlabel="t = steps / dimension", ylabel="generalization error")
        axes.legend(frameon=False)
        sentence = _meaning(told)
        _save(canvas, axes, name(told.problem), sentence, path)
    return sentence


def draw_phases(found: "Sweep", problem: "Problem", horizon: float, path: Path) -> str:
    """Draw plateau length and final error over bits and range, and return the sentence that says what they mean."""
    best = found.best()
    bits = np.array(found.bits)
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(10, 4.2), layout="constrained")
        both = canvas.subplots(1, 2, sharey=True)
        for axes, values, label in ((both[0], found.l10, "plateau length L10"), (both[1], found.error, f"error at t = {horizon:.4g}")):
            shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            image = axes.pcolormesh(found.ranges, bits, shown, norm="log", shading="nearest", rasterized=True)
            canvas.colorbar(image, ax=axes, label=label)
            axes.plot(best, bits, color="white", marker="o", linewidth=1, markeredgecolor="black", label="best range")
            axes.set(xlabel="range of the weight grid", yticks=bits)
        both[0].set_ylabel("bits per weight")
        both[1].legend(frameon=True, loc="lower right")
        k = int(np.argmin(found.error.min(axis=1)))
        sentence = (
            f"Until t = {horizon:.4g} the best range goes from {best[0]:.3g} at {bits[0]} bits to {best[-1]:.3g} at {bits[-1]} bits; "
            f"the smallest error of all, {np.min(found.error):.3g}, is reached with {bits[k]} bits."
        )
        _save(canvas, both[0], f"{METHODS[problem.method]}, lr {problem.lr:g}, noise {problem.label_noise:g}", sentence, path)
    return sentence


def _meaning(told: "Forecast") -> str:
    """Return one sentence: plateau, drop, end, and the comparison with rounding."""
    p, end = told.plateau, told.end.error if told.end is not None else float(told.curve.error[-1])
    if not np.isfinite(p.l10):
        return "The error never falls below its start."
    versus = told.unquantized_end.error
    if np.isclose(end, versus, rtol=0.02):
        compared = "as plain rounding does"
    else:
        compared = f"{'below' if end < versus else 'above'} plain rounding ({versus:.3g})"
    start = _start(told)
    overshoot = ", overshoots" if float(np.min(told.curve.error)) < 0.9 * end else ""
    return f"{start}, nine tenths of the way by t = {p.l90:.3g}{overshoot} and ends at {end:.3g}, {compared}."


def _start(told: "Forecast") -> str:
    """Return how the curve begins: at once, after a plateau, or with a plateau behind a first drop."""
    p, e = told.plateau, told.estimate
    if e.mechanism == "none" and e.reason == FALLS:
        return "The error falls from the start"
    if e.mechanism == "none":
        return f"A tenth of the drop is done by t = {p.l10:.3g} ({e.reason}), the error falls"
    if e.mechanism != "in-cell":
        return f"After a plateau of {p.l10:.3g} ({e.mechanism}) the error falls"
    if p.flat is None:
        return f"A tenth of the drop is done by t = {p.l10:.3g}, no part is flat although weights share a cell (in-cell), the error falls"
    return f"After a first drop and a plateau from t = {p.flat[0]:.3g} to {p.flat[1]:.3g} (in-cell) the error falls"


def _save(canvas: Figure, axes: "Axes", title: str, sentence: str, path: Path) -> None:
    """Write title and sentence, and the file."""
    canvas.suptitle(title, fontsize=10, x=0.01, ha="left", weight="bold")
    canvas.supxlabel(fill(sentence, WRAP), fontsize=9, x=0.01, ha="left")
    known = canvas.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise ValueError(f"`figure` must end in one of {', '.join(sorted(known))}: got {str(path)!r}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"`figure` must lie in a folder: got {str(path)!r}, but {str(path.parent)!r} is a file.") from None
    canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
