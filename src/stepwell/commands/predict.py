"""`stepwell predict`: the learning curve of quantized training before it is run, or a phase diagram over bits and ranges."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepwell.commands.output import Json, print_json, print_table

if TYPE_CHECKING:
    from stepwell.theory import Problem, Sweep, Trajectory
    from stepwell.theory.forecast import Forecast

Kind = Literal["end", "mid", "tread"]
Theory = Literal["exact", "closure"]
MAX_POINTS = 100_000
OPTIONS = {
    "label_noise": "noise", "initial_variance": "variance", "initial_overlap": "overlap", "weight_decay": "weight-decay", "horizon": "time",
}  # fmt: skip
EXAMPLE = "must look like bits=2:8 range=0.5:4:64, low to high"


def predict(
    *,
    bits: Annotated[int, typer.Option(help="Bits per weight, 1..16.")] = 2,
    range: Annotated[float, typer.Option(help="Range of the weight grid.")] = 2.0,
    kind: Annotated[Kind, typer.Option(help="Levels: end points on the range, cell centres, or with a zero.")] = "end",
    input_bits: Annotated[int | None, typer.Option(help="Bits per input; none: inputs are not quantized.", show_default=False)] = None,
    input_range: Annotated[float | None, typer.Option(help="Range of the input grid; that of the weights.", show_default=False)] = None,
    input_kind: Annotated[Kind | None, typer.Option(help="Levels of the input grid; those of the weights.", show_default=False)] = None,
    method: Annotated[Literal["ste", "clipped_ste", "lotion", "ptq"], typer.Option(help="How weights are trained.")] = "ste",
    lr: Annotated[float, typer.Option(help="Learning rate, per coordinate of the 1/sqrt(d)-scaled model.")] = 0.1,
    noise: Annotated[float, typer.Option(help="Standard deviation of the label noise.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    teacher: Annotated[Literal["one", "gauss"], typer.Option(help="Teacher weights: all equal, or Gaussian.")] = "one",
    overlap: Annotated[float, typer.Option(help="Overlap with the teacher at the start.")] = 0.0,
    variance: Annotated[float, typer.Option(help="Variance of the weights at the start.")] = 1.0,
    strength: Annotated[float, typer.Option(help="LOTION's strength.")] = 1.0,
    time: Annotated[float | None, typer.Option(help="Last time t = steps / dimension; 8 / (lr a).", show_default=False)] = None,
    theory: Annotated[
        Theory | None, typer.Option(help="The exact limit (of a curve) or the Gaussian approximation (of a sweep).", show_default=False)
    ] = None,
    sweep: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Phase diagram instead of a curve, for example: bits=2:8 range=0.5:4:64", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Simulate the training as well, with error bars (needs numba).")] = False,
    dim: Annotated[int | None, typer.Option(help="Dimension of the simulation of --check; 1000.", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of the simulation of --check; 4.", show_default=False)] = None,
    figure: Annotated[Path, typer.Option(help="Where the figure goes; the suffix chooses the format.")] = Path("predict.svg"),
    json: Json = False,
) -> None:
    """Predict the learning curve of quantized linear regression: plateau, final error, stability, and what rounding would do."""
    from stepwell.theory import Problem, Staircase

    if input_bits is None and (input_range is not None or input_kind is not None):
        raise ValueError("`input-bits` must be given with `input-range` or `input-kind`: got none.")
    if check and sweep is not None:
        raise ValueError("`check` must not be given with `sweep`: a phase diagram is not simulated. Leave one of them out.")
    if not check and (dim is not None or seeds is not None):
        raise ValueError("`check` must be given with `dim` or `seeds`: nothing is simulated without it. Add --check.")
    with _named_as_options():
        inputs = None if input_bits is None else Staircase(input_bits, range if input_range is None else input_range, input_kind or kind)
        problem = Problem(
            Staircase(bits, range, kind), inputs, method, lr, noise, weight_decay, teacher,
            initial_overlap=overlap, initial_variance=variance, strength=strength,
        )  # fmt: skip
        if sweep is not None:
            _phases(problem, time, theory or "closure", sweep, figure, json=json)
        else:
            simulation = (1000 if dim is None else dim, 4 if seeds is None else seeds) if check else None
            _curve(problem, time, theory or "exact", simulation, figure, json=json)


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Let messages name the options of this command, not the arguments of the library."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for argument, option in OPTIONS.items():
            message = message.replace(f"`{argument}`", f"`{option}`")
        error.args = (message,)
        raise


def _curve(problem: "Problem", time: float | None, theory: Theory, check: tuple[int, int] | None, figure: Path, *, json: bool) -> None:
    """Solve one setting, draw it, print it."""
    from stepwell.commands.predict_figures import draw_curve, name
    from stepwell.commands.predict_tables import findings, points, record
    from stepwell.theory.forecast import forecast

    told = forecast(problem, time, theory=theory)
    simulated = _simulated(told, *check) if check else None
    place = _place(figure)
    sentence = draw_curve(told, simulated, figure)
    if json:
        print_json(record(told, simulated) | {"theory": theory, "figure": str(figure.resolve()), "meaning": sentence})
        return
    print_table(points(told, simulated), title=f"Learning curve of {name(problem)} ({theory} theory, t = steps / dimension)")
    print()
    print_table(findings(told, simulated), title="What to expect", note=f"{sentence}\nFigure: {place}")


def _place(figure: Path) -> str:
    """Return where the figure goes, and whether it replaces one; to be asked before it is drawn."""
    return f"{figure.resolve()}" + (" (replaced)" if figure.exists() else "")


def _simulated(told: "Forecast", dim: int, seeds: int) -> "Trajectory":
    """Simulate at the times that are shown."""
    from rich.console import Console

    from stepwell.commands.predict_tables import shown
    from stepwell.theory import simulate

    with Console(stderr=True).status(f"simulating {seeds} runs of dimension {dim}"):
        return simulate(told.problem, told.curve.t[shown(told)], dim=dim, seeds=seeds)


def _phases(problem: "Problem", time: float | None, theory: Theory, ranges: tuple[str, str], figure: Path, *, json: bool) -> None:
    """Solve every point of the phase diagram, draw it, print one line per bit width."""
    from stepwell.commands.predict_figures import draw_phases
    from stepwell.theory.forecast import SCALES

    widths, omegas = parse_sweep(ranges)
    horizon = SCALES / (problem.lr * problem.gain) if time is None else time
    found = _solved(problem, horizon, theory, widths, omegas)
    place = _place(figure)
    sentence = draw_phases(found, problem, horizon, figure)
    best = found.best()
    rows = [
        {
            "bits": width,
            "best_range": float(best[k]),
            "error_there": float(found.error[k].min()),
            "plateau_there": float(found.l10[k, found.error[k].argmin()]),
            "longest_plateau": float(found.l10[k].max()),
            "at_range": float(omegas[int(found.l10[k].argmax())]),
        }
        for k, width in enumerate(widths)
    ]
    if json:
        whole = {"ranges": omegas, "l10": found.l10, "l90": found.l90, "error": found.error, "status": found.status}
        print_json({"theory": theory, "horizon": horizon, "rows": rows, **whole, "figure": str(figure.resolve()), "meaning": sentence})
        return
    print_table(rows, title=f"Best range until t = {horizon:.4g} ({theory} theory)", note=f"{sentence}\nFigure: {place}")


def _solved(problem: "Problem", horizon: float, theory: Theory, widths: list[int], omegas: list[float]) -> "Sweep":
    """Sweep one bit width after the other, with a progress bar on standard error."""
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from stepwell.theory import Sweep, sweep

    bar = track(
        widths, "solving", console=Console(stderr=True), transient=True, disable=len(widths) * len(omegas) < 500 and theory == "closure"
    )
    parts = [sweep(problem, horizon, bits=[width], ranges=omegas, theory=theory) for width in bar]
    l10, l90, error = (np.concatenate([getattr(part, field) for part in parts]) for field in ("l10", "l90", "error"))
    return Sweep(tuple(widths), parts[0].ranges, l10, l90, error, tuple(part.status[0] for part in parts))


def parse_sweep(words: tuple[str, str]) -> tuple[list[int], list[float]]:
    """Return bit widths and ranges of `bits=LOW:HIGH range=LOW:HIGH:COUNT`, in any order.

    Raises:
        ValueError: anything else, showing what came.

    >>> parse_sweep(("bits=2:4", "range=0.5:2:4"))
    ([2, 3, 4], [0.5, 1.0, 1.5, 2.0])
    """
    came = " ".join(words)
    parts = dict(word.split("=", 1) for word in words if "=" in word)
    if set(parts) != {"bits", "range"}:
        raise ValueError(f"`sweep` {EXAMPLE}: got {came!r}.")
    try:
        (first, last), (low, high, count) = map(int, parts["bits"].split(":")), parts["range"].split(":")
        start, stop, points = float(low), float(high), int(count)
    except ValueError:
        raise ValueError(f"`sweep` {EXAMPLE}: got {came!r}.") from None
    if not (1 <= first <= last <= 16 and 0 < start < stop < float("inf") and 2 <= points <= MAX_POINTS):
        raise ValueError(f"`sweep` {EXAMPLE}; bits 1..16, ranges above 0, 2..{MAX_POINTS} points: got {came!r}.")
    return list(range(first, last + 1)), [start + (stop - start) * k / (points - 1) for k in range(points)]
