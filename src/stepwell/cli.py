"""The command line: `stepwell COMMAND`. Exit codes: 0 done, 2 bad input with one line that says so, 1 failure."""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

# Each is a function of that name in `stepwell.commands.NAME`.
COMMANDS = ("demo", "explain", "export", "formats", "inspect", "predict", "quantize", "train", "verify")
BAD_INPUT = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def build() -> typer.Typer:
    """Return the application with every command of `COMMANDS`."""
    app = typer.Typer(name="stepwell", add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    for name in COMMANDS:
        app.command(name)(getattr(import_module(f"stepwell.commands.{name}"), name))
    return app


def main() -> None:
    """Run the command line and leave with its exit code; without arguments, with the help and 2."""
    try:
        if not sys.argv[1:]:
            build()(["--help"], prog_name="stepwell", standalone_mode=False)
            sys.exit(2)
        sys.exit(build()(prog_name="stepwell", standalone_mode=False))
    except BAD_INPUT as error:
        if isinstance(error, TypeError) and "`" not in str(error):
            raise  # Python's own, which names no argument of ours in backticks: a bug, to be shown whole
        _leave(error, 2)
    except (ImportError, OSError, ArithmeticError) as error:  # what is not installed, a disk that is full, a run that diverged
        _leave(error, 1)
    except typer.Abort:  # Ctrl-C, where typer does not make it this exit code itself
        sys.exit(130)
    except Exception as error:
        # click's errors of usage: newer typers carry their own click, so there is no class that all of them export
        if not hasattr(error, "format_message"):
            raise
        said, context = str(error.format_message()), getattr(error, "ctx", None)
        _leave(f"{said}{'' if said.endswith(('.', '?')) else '.'} Try `{context.command_path if context else 'stepwell'} --help`.", 2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("stepwell"))
        raise typer.Exit


def _options(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Train, explain, predict and ship quantized neural networks, on the exact grid the runtime will use."""


def _leave(error: Exception | str, code: int) -> None:
    """Print an error as one line and exit."""
    print("stepwell:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)
