"""`stepwell export MODEL ENCODED OUT --target ..`: codes and scales that were saved, into a runtime's own file, with a certificate."""

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stepwell.commands.output import Json, print_json
from stepwell.commands.quantize import BATCHES, MODEL, TARGET, as_results, progress_bar, show, write


def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    encoded: Annotated[Path, typer.Argument(help="Codes and scales that `stepwell.save` wrote, by parameter name.")],
    out: Annotated[Path, typer.Argument(help="Folder for the artifact and its certificate.")],
    *,
    target: Annotated[str, typer.Option(help=TARGET)],
    data: Annotated[
        Path | None, typer.Option(help="Text for a Hugging Face folder; else passed to the function.", show_default=False)
    ] = None,
    batches: Annotated[int, typer.Option(help="Most batches to use.")] = BATCHES,
    window: Annotated[int | None, typer.Option(help="Tokens of a row of text; 128 or what the model reads.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is there.")] = False,
    json: Json = False,
) -> None:
    """Export weights that are encoded already; the others come from the model. Exit code 1 if the runtime loaded anything else."""
    if batches < 1:
        raise ValueError(f"`batches` must be at least 1: got {batches}.")
    from stepwell.quantizers import Encoded
    from stepwell.ship.artifact import check_place
    from stepwell.ship.checkpoint import refuse_pickle
    from stepwell.ship.quantize import Order, quantize
    from stepwell.ship.source import open_source
    from stepwell.storage import load

    order = Order(target, "rtn", force=force)
    _ = order.grid
    check_place(out, force=force)
    refuse_pickle(encoded, "encoded")
    weights = load(encoded)
    if isinstance(weights, Encoded):
        raise ValueError(f"`encoded`: {encoded} holds one weight without a name. Save a mapping from parameter names to weights.")
    with redirect_stdout(sys.stderr), progress_bar() as progress:
        progress("loading", 0, 1)
        source = open_source(model, data, limit=batches, window=window)
        with quantize(source, order, out, encoded=weights, progress=progress) as draft:
            shipped = replace(draft, out=str(out.absolute()))
            write(shipped, Path(draft.out))
    if json:
        print_json(as_results(shipped))
    else:
        show(shipped)
    if not shipped.certificate.passed:
        raise typer.Exit(1)
