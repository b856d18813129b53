"""`stepwell explain MODEL`: why rounding fails on a model, what is near, and which method will reach the tolerance."""

import re
import sys
import time
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepwell.commands.files import check_folder, write_together
from stepwell.commands.output import Json, console, plain, print_json, print_table

if TYPE_CHECKING:
    from stepwell.blocks import Block
    from stepwell.explain import Effort, Explanation
    from stepwell.explain.sources import Subject
    from stepwell.quantizers import Quantizer

PAGE_FILE, RESULTS_FILE = "explain.html", "explain.json"
BATCHES = 12  # a third of them calibrates
TRIALS = 2  # the first evaluation on a new number of threads is slow
WORTH = 0.8  # of the time of one thread, from which more threads are worth it
MODEL = "What to explain: module:function or file.py:function that returns (model, loss, batches), or a Hugging Face folder."


def explain(
    model: Annotated[str, typer.Argument(help=MODEL)],
    *,
    data: Annotated[
        Path | None, typer.Option(help="Text file for a Hugging Face folder; else passed to the function.", show_default=False)
    ] = None,
    bits: Annotated[str, typer.Option(help="Bits per weight, 2..8, separated by commas.")] = "8,4,3,2",
    schemes: Annotated[
        str, typer.Option(help="How scales are made: tensor, channel or block32 (any number), with -absmax or -mse.")
    ] = "channel-mse",
    tolerance: Annotated[float, typer.Option(help="Increase of the loss that is acceptable, in its unit.")] = 0.1,
    skip: Annotated[
        list[str] | None, typer.Option(help="Parameter or module to leave in float; may be repeated.", show_default=False)
    ] = None,
    batches: Annotated[int, typer.Option(help="Most batches to use, at least 3.")] = BATCHES,
    window: Annotated[int | None, typer.Option(help="Tokens of a row of text; 128 or what the model reads.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points, shorter searches.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every point, long searches, a closer look at every grid that fails.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the page and the results.")] = Path("out/explain"),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Json = False,
) -> None:
    """Explain why rounding fails on a model, what is near, and which method will reach the tolerance; write a page and its numbers."""
    if quick and full:
        raise ValueError("`quick` and `full` exclude each other: got both. Give one of them.")
    if batches < 3:
        raise ValueError(f"`batches` must be at least 3: got {batches}. One of them calibrates, the others measure.")
    grids = [(scheme, width) for scheme in parse_schemes(schemes) for width in parse_bits(bits)]
    check_folder(out, (PAGE_FILE, RESULTS_FILE))
    from stepwell.commands.explain_page import page
    from stepwell.commands.explain_tables import cost, summaries
    from stepwell.explain import FULL, NORMAL, QUICK
    from stepwell.probes.stage import check_tolerance
    from stepwell.report import render

    check_tolerance(tolerance)
    effort = QUICK if quick else FULL if full else NORMAL
    with redirect_stdout(sys.stderr):  # what the user's own code prints must not stand between the results, JSON above all
        subject = load(model, data, batches, window)
        explanation = run(subject, [quantizer(scheme, width) for scheme, width in grids], tolerance, effort, skip or [])
    results = as_results(subject, explanation)
    paths = write_together(out, {PAGE_FILE: render(page(subject, explanation)), RESULTS_FILE: dumped(results)})
    if json:
        print_json(results | {"files": paths})
        return
    for title, rows, note in summaries(explanation):
        print_table(rows, title=title, note=f"{note}\n")
    console().print(*cost(explanation), f"Page: {paths[PAGE_FILE]}", sep="\n", highlight=False, soft_wrap=False)
    if open_page:
        open_in_browser(Path(paths[PAGE_FILE]))


def parse_bits(words: str) -> list[int]:
    """Return the bit widths of "8,4,3,2", each once.

    Raises:
        ValueError: anything else than whole numbers from 2 to 8.

    >>> parse_bits("4, 2,4")
    [4, 2]
    """
    parts = [word.strip() for word in words.split(",")]
    if not all(re.fullmatch(r"[2-8]", part) for part in parts):
        raise ValueError(f"`bits` must be whole numbers from 2 to 8, separated by commas: got {words!r}. Write --bits 8,4,3,2.")
    return list(dict.fromkeys(map(int, parts)))


def parse_schemes(words: str) -> list[str]:
    """Return the schemes of "channel-mse,block32-absmax", each once.

    Raises:
        ValueError: anything else.
    """
    parts = [word.strip() for word in words.split(",")]
    if not all(re.fullmatch(r"(tensor|channel|block[1-9]\d{0,5})-(absmax|mse)", part) for part in parts):
        raise ValueError(f"`schemes` must be such as tensor-absmax, channel-mse or block32-mse, separated by commas: got {words!r}.")
    return list(dict.fromkeys(parts))


def quantizer(scheme: str, bits: int) -> "Quantizer":
    """Return the grid of a scheme: symmetric integers with float32 scales."""
    from stepwell.presets import intn

    granularity, rule = scheme.split("-")
    block: Block = None if granularity == "tensor" else "channel"
    if granularity.startswith("block"):
        block = int(granularity.removeprefix("block"))
    return intn(bits, block=block, scale="mse" if rule == "mse" else "absmax")


def load(model: str, data: Path | None, batches: int, window: int | None) -> "Subject":
    """Return model, loss and batches, the model in evaluation mode and the loss tried on every batch.

    Raises:
        ValueError: whatever is wrong with them, in one line.
    """
    import torch

    from stepwell.explain.language import from_folder
    from stepwell.explain.sources import FORM, attempted, from_function

    if Path(model).is_dir():
        return from_folder(Path(model), data, limit=batches, window=window)
    if ":" not in model:
        raise ValueError(f"`model` must be {FORM}: got {model!r}, which is no folder.")
    if window is not None:
        raise ValueError(f"`window` must not be given with a function: got {window}. It cuts text for a Hugging Face folder.")
    subject = from_function(model, data, limit=batches)
    subject.model.eval()  # before the first look: in training mode BatchNorm would take the statistics of this data
    with torch.no_grad():
        for place, batch in enumerate(subject.batches, 1):
            what = f"`model`: the loss of {model} on batch {place} of {len(subject.batches)}"
            attempted(lambda batch=batch: subject.loss(subject.model, batch), what)  # type: ignore[misc]
    return subject


def run(subject: "Subject", grids: list["Quantizer"], tolerance: float, effort: "Effort", skip: list[str]) -> "Explanation":
    """Say what will be done, and measure, with a progress bar on standard error."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from stepwell.explain import measure

    before = torch.get_num_threads()
    threads, seconds = _fastest(subject, before)
    passes, words = _announced(subject, grids, effort, skip, seconds)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console, waiting = Console(stderr=True, markup=False, highlight=False), [words]
    torch.set_num_threads(threads)
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=passes)

            def progress(part: str, done: float) -> None:
                if waiting and part != "checks":  # what is refused by the checks is one line and no more
                    console.print(waiting.pop())
                bar.update(task, description=f"{part:<12}", completed=min(done, passes))

            return measure(
                subject.model, subject.loss, subject.batches,
                quantizers=grids, tolerance=tolerance, effort=effort, skip=skip, progress=progress,
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def as_results(subject: "Subject", explanation: "Explanation") -> dict[str, Any]:
    """Return everything that was measured, as names and numbers."""
    from stepwell.commands.explain_tables import summary

    return {
        "model": subject.name,
        "unit": subject.unit,
        "facts": dict(subject.facts),
        "summary": [summary(report) for report in explanation.grids],
        "cost": {"forward": explanation.forward, "backward": explanation.backward, "seconds": explanation.seconds},
        **as_mapping(explanation),
    }


def as_mapping(value: Any) -> Any:
    """Return records as mappings, dataclasses and named tuples alike, whatever they are inside of."""
    if hasattr(value, "_asdict"):
        return {name: as_mapping(item) for name, item in value._asdict().items()}
    if is_dataclass(value):
        return {field.name: as_mapping(getattr(value, field.name)) for field in fields(value)}
    return [as_mapping(item) for item in value] if isinstance(value, list | tuple) else value


def dumped(results: dict[str, Any]) -> str:
    """Return results as the text of a JSON file."""
    from json import dumps

    return dumps(plain(results), indent=1, allow_nan=False) + "\n"


def open_in_browser(path: Path) -> None:
    """Open the page where somebody is there to see it."""
    import webbrowser

    if sys.stdout.isatty():
        webbrowser.open(path.as_uri())


def _fastest(subject: "Subject", threads: int) -> tuple[int, float]:
    """Return with how many threads a pass over all batches is fastest, and its seconds; small networks lose time to a second thread."""
    import torch

    times = {}
    try:
        for count in dict.fromkeys((threads, 1)):
            torch.set_num_threads(count)
            times[count] = min(_timed(subject) for _ in range(TRIALS))
    finally:
        torch.set_num_threads(threads)
    best = threads if times[threads] < WORTH * times[1] else 1
    return best, times[best]


def _timed(subject: "Subject") -> float:
    """Return about how long a pass over all batches takes, in seconds, judged by the first batch."""
    import torch

    with torch.no_grad():
        began = time.perf_counter()
        value = subject.loss(subject.model, subject.batches[0])
        if isinstance(value, torch.Tensor):
            value.sum().item()  # as a number, so that a GPU has finished
    return (time.perf_counter() - began) * len(subject.batches)


def _announced(subject: "Subject", grids: list["Quantizer"], effort: "Effort", skip: list[str], seconds: float) -> tuple[float, str]:
    """Return about how many passes will be made, and the sentence that says so."""
    from stepwell.advice.measure import divide
    from stepwell.commands.explain_words import counted
    from stepwell.explain import planned, scheme
    from stepwell.selection import select

    layers, parts = len(select(subject.model, skip=skip).chosen), divide(subject.batches, None)
    sizes = (len(parts.calibrating), len(parts.measuring))
    passes = planned(effort, grids=len(grids), schemes=len({scheme(grid) for grid in grids}), layers=layers, batches=sizes)
    words = (
        f"{effort.name} mode: {counted(len(grids), 'grid')}, {counted(layers, 'layer')}, about {passes:.0f} passes over "
        f"{counted(len(subject.batches), 'batch', 'batches')}, "
        f"{seconds:.2g} s each: {_duration(passes * seconds)}, and what happens between them."
    )
    return passes, words


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if 1 <= seconds < 90 else "a second" if seconds < 90 else f"about {seconds / 60:.0f} minutes"
