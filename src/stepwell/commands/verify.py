"""`stepwell verify ARTIFACT MODEL`: is an artifact whole, made from this model, and does its runtime compute what its weights say?"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from stepwell.commands.explain import as_mapping
from stepwell.commands.output import Json, console, print_json, print_table
from stepwell.commands.quantize import BATCHES, MODEL, MOST_ROWS, progress_bar

ARTIFACT = "What `stepwell quantize` wrote, or any .onnx, .gguf or .safetensors file or folder of such a kind."


def verify(
    artifact: Annotated[Path, typer.Argument(help=ARTIFACT)],
    model: Annotated[str, typer.Argument(help=MODEL)],
    *,
    data: Annotated[
        Path | None, typer.Option(help="Text for a Hugging Face folder; else passed to the function.", show_default=False)
    ] = None,
    batches: Annotated[
        int | None, typer.Option(help=f"Most batches to use; as many as `quantize` did, else {BATCHES}.", show_default=False)
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a row of text; 128 or what the model reads.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Check an artifact against the float model that it was made from; exit code 1 if anything is not as it should be."""
    if not artifact.exists():
        raise FileNotFoundError(f"`artifact`: nothing at {artifact}. Give what `stepwell quantize` wrote.")
    if batches is not None and batches < 1:
        raise ValueError(f"`batches` must be at least 1: got {batches}.")
    from stepwell.ship.recheck import batches_of, recheck
    from stepwell.ship.source import open_source

    with redirect_stdout(sys.stderr), progress_bar() as progress:
        progress("loading", 0, 3)
        limit = batches or batches_of(artifact) or BATCHES
        done = recheck(artifact, open_source(model, data, limit=limit, window=window), progress=progress)
    if json:
        print_json(as_mapping(done) | {"certificate": done.certificate.to_dict()})
    else:
        from stepwell.commands.quantize_words import compared

        worst = sorted(done.weights, key=lambda one: -one.error)[:MOST_ROWS]
        rows = [{"weight": one.name, "relative_error": one.error, "cosine": one.cosine, "as_certified": one.unchanged} for one in worst]
        more = f", the {len(rows)} farthest from the model" if len(rows) < len(done.weights) else ""
        print_table(rows, title=f"{artifact} beside {model}: {len(done.weights)} quantized weights{more}")
        lines = [f"{'Passed' if done.passed else 'NOT PASSED'}{': ' if done.problems else '.'}{'; '.join(done.problems)}"]
        if done.losses is not None:
            lines.append(
                f"Loss on {done.losses.batches} batches: {done.losses.before:.4f} in float, {done.losses.after:.4f} with the artifact's "
                f"weights, {done.losses.increase:+.4f} {done.losses.unit}."
            )
        lines.append(f"Loaded and run by {done.certificate.runtime} {done.certificate.version}.")
        if not done.certified:
            lines.append("There is no certificate beside it: whether it is what was once written is not known.")
        console().print(*lines, *compared(done.certificate)[1:], sep="\n", highlight=False, soft_wrap=True)
    if not done.passed:
        raise typer.Exit(1)
