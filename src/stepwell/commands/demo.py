"""`stepwell demo`: one honest run on real data, from a trained network to a runtime."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepwell.commands.output import Json, print_json, print_table

if TYPE_CHECKING:
    from stepwell.train.compare import Comparison
    from stepwell.train.story import Story

ONNX_FILE, PAGE_FILE, RESULTS_FILE, PICTURE_FILE = "digits-4bit.onnx", "report.html", "results.json", "demo.svg"


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the page, the results and the ONNX model.")] = Path("out/demo"),
    seeds: Annotated[
        int | None, typer.Option(help="Networks to train per method, at least 2; 5, or 3 if quick.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer widths and steps, one learning rate.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Json = False,
) -> None:
    """Train digits, quantize them to 8, 4, 3 and 2 bits, compare the methods, ship the best 4-bit model, write a report."""
    if seeds is not None and seeds < 2:
        raise ValueError(f"`seeds` must be at least 2: got {seeds}. A spread needs two networks; 5 is the default.")
    need_extras()
    need_folder(out)
    from stepwell.recipes.digits import digits, quick_digits

    config = quick_digits() if quick else digits()
    story = run(config if seeds is None else replace(config, seeds=tuple(range(seeds))), out)
    written = write_results(story, out)
    if json:
        print_json(written)
        return
    from stepwell.commands.demo_page import beyond_bound

    note = f"{NOTE}\n{beyond_bound(story)}".rstrip()
    print_table(summary(story), title="Handwritten digits on held-out images, mean ± standard error over seeds", note=note)
    print(f"Report: {(out / PAGE_FILE).resolve()}")
    if open_page:
        open_in_browser(out / PAGE_FILE)


NOTE = "loss: nats per image. gain: RTN's loss minus this one's, paired by seed, in standard errors (se)."


def need_extras() -> None:
    """Say what to install before anything is trained.

    Raises:
        ModuleNotFoundError: scikit-learn or one of the onnx packages is not installed.
    """
    from stepwell.export.extras import need

    need("sklearn", "onnx", "onnx_ir", "onnxscript", "onnxruntime", extra="demo")


def need_folder(out: Path) -> None:
    """Make the folder, and a file in it for a moment, before anything is trained.

    Raises:
        ValueError: the folder cannot be made, or nothing can be written into it.
    """
    from tempfile import TemporaryFile

    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"`out`: cannot write into the folder {out} ({error.strerror or error}). Give another one with --out.") from error


def run(config: "Comparison", out: Path) -> "Story":
    """Train, compare and ship, with a progress bar on standard error."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from stepwell.train.compare import count_fits
    from stepwell.train.story import tell

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    threads, started = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)  # networks this small lose time to a second thread
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("training", total=count_fits(config))
            story = tell(config, out / ONNX_FILE, lambda words: progress.update(task, advance=1, description=f"{words:<36}"))
    finally:
        torch.set_num_threads(threads)
    return story._replace(seconds=time.process_time() - started)


def write_results(story: "Story", out: Path) -> dict[str, Any]:
    """Write page, picture and results into `out`, and return what `results.json` holds."""
    from json import dumps

    from stepwell.commands.demo_figures import picture
    from stepwell.commands.demo_page import page
    from stepwell.commands.output import plain
    from stepwell.report import write

    results = as_results(story) | {"files": {name: str((out / name).resolve()) for name in (PAGE_FILE, PICTURE_FILE, ONNX_FILE)}}
    write(page(story), out / PAGE_FILE)
    (out / PICTURE_FILE).write_text(picture(story), encoding="utf-8")
    (out / RESULTS_FILE).write_text(dumps(plain(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return results


def as_results(story: "Story") -> dict[str, Any]:
    """Return everything that was measured, as names and numbers."""
    return {
        "summary": [as_mapping(row) for row in story.rows],
        "claims": [as_mapping(claim) | {"holds": claim.holds} for claim in story.claims],
        "shipped": story.shipped._asdict() | {"certificate": story.shipped.certificate.to_dict()},
        "trials": [as_mapping(trial) for trial in story.trials],
        "distances": story.distances,
        "seconds": story.seconds,
        "versions": story.versions,
    }


def as_mapping(record: Any) -> dict[str, Any]:
    """Return a named tuple as a mapping, named tuples inside it too."""
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in record._asdict().items()}


def summary(story: "Story") -> list[dict[str, object]]:
    """Return the rows of the terminal's table."""
    from stepwell.recipes.digits import RTN
    from stepwell.train.compare import FULL_PRECISION

    baseline = (FULL_PRECISION, RTN)
    return [
        {
            "bits": row.bits,
            "method": row.arm,
            "loss": f"{row.loss.mean:.4f} ± {row.loss.stderr:.4f}",
            "accuracy": f"{100 * row.accuracy.mean:.1f} %",
            "randomized_loss": f"{row.randomized_loss.mean:.4f} ± {row.randomized_loss.stderr:.4f}",
            "gain": "" if row.arm in baseline else f"{row.gain.mean:+.4f}",
            "in_se": "" if row.arm in baseline else f"{row.gain.sigmas:+.1f}",
        }
        for row in story.rows
    ]


def open_in_browser(path: Path) -> None:
    """Open the page where somebody is there to see it."""
    import webbrowser

    if sys.stdout.isatty():
        webbrowser.open(path.resolve().as_uri())
