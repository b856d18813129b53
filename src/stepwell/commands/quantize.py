"""`stepwell quantize MODEL OUT --target ..`: from a checkpoint to a runtime's own file, with a certificate of what the runtime loaded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepwell.commands.explain import as_mapping, dumped, open_in_browser
from stepwell.commands.output import Json, console, print_json, print_table

if TYPE_CHECKING:
    from stepwell.ship.quantize import Order
    from stepwell.ship.records import Shipped
    from stepwell.ship.rounding import Progress

PAGE_FILE, RESULTS_FILE = "certificate.html", "certificate.json"
BATCHES = 24  # a third of them measures
MOST_ROWS = 12
MODEL = (
    "What to quantize: a Hugging Face folder with safetensors, or module:function or file.py:function that returns (model, loss, batches)."
)
TARGET = "What it is for: onnx:matmulnbits, compressed-tensors, gguf:q4_0, .. (a wrong one lists them)."
METHOD = "auto, rtn, search, gptq, ste, lotion or default (the recommended training); auto asks `sw.advise`, without data it is rtn."
ACTIVATIONS = "Round what goes into the layers too: int8 (one range per layer, from --data) or int8-token (a scale per token); for ONNX."


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Argument(help="Folder for the artifact and its certificate.")],
    *,
    target: Annotated[str, typer.Option(help=TARGET)],
    data: Annotated[
        Path | None, typer.Option(help="Text for a Hugging Face folder; else passed to the function.", show_default=False)
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight; the target's own.", show_default=False)] = None,
    block: Annotated[int | None, typer.Option(help="Weights per scale; the target's own.", show_default=False)] = None,
    method: Annotated[str, typer.Option(help=METHOD)] = "auto",
    tolerance: Annotated[float, typer.Option(help="Increase of the loss that is acceptable, in its unit.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Optimizer steps, where the method trains.")] = 200,
    rate: Annotated[float | None, typer.Option(help="Learning rate; 2e-4 for a folder, 1e-3 for a function.", show_default=False)] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Bits of its own for every layer: the fewest within --tolerance.")] = False,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="Bits of its own for every layer: the best with so many on average.", show_default=False)
    ] = None,
    activations: Annotated[str | None, typer.Option(help=ACTIVATIONS, show_default=False)] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Parameter or module to leave in float; may be repeated.", show_default=False)
    ] = None,
    batches: Annotated[int, typer.Option(help="Most batches to use, where nothing is trained.")] = BATCHES,
    window: Annotated[int | None, typer.Option(help="Tokens of a row of text; 128 or what the model reads.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the certificate in a browser.")] = False,
    json: Json = False,
) -> None:
    """Quantize a model for a runtime: round or train, export, load it there, compare, and write the artifact with its certificate.

    OUT appears when all of it is complete. It is exit code 1 if the runtime did not load what was encoded, or if --method auto or --mixed
    missed the tolerance that they aim at.
    """
    if batches < 2:
        raise ValueError(f"`batches` must be at least 2: got {batches}. Some calibrate, the others measure.")
    from stepwell.ship.artifact import check_place
    from stepwell.ship.quantize import Order
    from stepwell.ship.source import folder_of

    checkpoint = folder_of(model)
    chosen = "rtn" if method == "auto" and data is None and checkpoint is not None else method
    order = Order(target, chosen, bits, block, tolerance, steps, rate, tuple(skip or ()), seed, force, mixed, bits_per_weight, activations)
    _ = order.grid
    check_place(out, force=force)
    with (
        redirect_stdout(sys.stderr),  # what the user's own code prints must not stand between the results, JSON above all
        progress_bar() as progress,
        making(model, data, out, order, batches, window, progress) as draft,
    ):
        shipped = replace(draft, out=str(out.absolute()))
        write(shipped, Path(draft.out))
    if json:
        print_json(as_results(shipped))
    else:
        show(shipped)
    if open_page:
        open_in_browser(Path(shipped.out) / PAGE_FILE)
    if not shipped.certificate.passed or (order.aims and shipped.within is False):
        raise typer.Exit(1)


@contextmanager
def making(
    model: str, data: Path | None, out: Path, order: "Order", batches: int, window: int | None, progress: "Progress"
) -> Iterator["Shipped"]:
    """Yield a finished artifact that takes its name after the block; its model is held in memory only where that is needed."""
    from stepwell.ship.choice import TRAINED
    from stepwell.ship.quantize import quantize as ship
    from stepwell.ship.source import folder_of, open_source
    from stepwell.ship.stream import is_streamed, stream

    checkpoint = folder_of(model)
    if checkpoint is not None and is_streamed(order, checkpoint, data):
        with stream(checkpoint, order, out, progress=progress) as shipped:
            yield shipped
        return
    progress("loading", 0, 1)
    training = order.method in TRAINED or (order.method == "auto" and not order.mixed and order.budget is None)
    limit = batches + (order.steps if training else 0)
    with ship(open_source(model, data, limit=limit, window=window), order, out, progress=progress) as shipped:
        yield shipped


def write(shipped: "Shipped", folder: Path) -> None:
    """Write the certificate into an artifact."""
    from stepwell.commands.quantize_page import page
    from stepwell.report import render

    (folder / RESULTS_FILE).write_text(dumped(as_results(shipped)), encoding="utf-8")
    (folder / PAGE_FILE).write_text(render(page(shipped)), encoding="utf-8")


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """Yield a function that shows what is being done, on standard error, where somebody is there to see it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda words, done, total: bar.update(task, description=f"{words[:48]:<48}", completed=done, total=total)


def as_results(shipped: "Shipped") -> dict[str, Any]:
    """Return everything that is known about an artifact, as names and numbers."""
    derived = {"bits_per_weight": shipped.bits, "within_tolerance": shipped.within, "passed": shipped.certificate.passed}
    return {**derived, **as_mapping(shipped), "certificate": shipped.certificate.to_dict()}


def show(shipped: "Shipped") -> None:
    """Print what a person wants to know, the command that serves it last."""
    from stepwell.commands.quantize_words import compared, headline, inputs, lost, reasons

    worst = sorted(shipped.weights, key=lambda one: -one.error)[:MOST_ROWS]
    noted = any(one.method for one in worst)
    rows = [
        {"weight": one.name, "shape": list(one.shape), "bits": one.bits, "relative_error": one.error}
        | ({"note": one.method} if noted else {})
        for one in worst
    ]
    more = f", the {len(rows)} that rounding moved most" if len(rows) < len(shipped.weights) else ""
    print_table(rows, title=f"{shipped.target}, {shipped.grid}: {len(shipped.weights)} weights{more}", note="")
    lines = [headline(shipped), *inputs(shipped), *reasons(shipped), *lost(shipped), *compared(shipped.certificate), *shipped.notes]
    lines += [f"In float: {name} ({why})" for name, why in list(shipped.floats.items())[:MOST_ROWS]]
    if len(shipped.floats) > MOST_ROWS:
        lines.append(f"and {len(shipped.floats) - MOST_ROWS} more in float, in the certificate.")
    lines += [f"Certificate: {Path(shipped.out) / PAGE_FILE}", "Serve it:", *(f"  {line}" for line in shipped.serve.splitlines())]
    console().print(*lines, sep="\n", highlight=False, soft_wrap=True)
