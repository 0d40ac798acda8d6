"""The command line: one file a command, no logic. Only commands that need TensorFlow import it, when they run."""

import functools
import sys
from typing import Annotated

import typer

from tfxfer import __version__
from tfxfer.cli import demo, evaluate, export, predict, search, sources, train, verify
from tfxfer.errors import Interrupted, Terminated, TfxferError


def _told(run):
    """Say that a command was interrupted; left to itself the library exits with 130 and says nothing."""

    @functools.wraps(run)
    def command(*args, **kwargs):
        try:
            return run(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted("interrupted.") from None

    return command


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tfxfer {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="tfxfer",
    help="Transfer learning for Keras and TensorFlow: photos in, a fine-tuned, scored and verified model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Transfer learning for Keras and TensorFlow: photos in, a fine-tuned, scored and verified model out."""


for module in (demo, sources, train, search, evaluate, predict, export, verify):
    app.command(module.NAME, help=module.HELP)(_told(module.run))


def main() -> None:
    """Run the command line; errors of ours become one sentence and their exit status."""
    try:
        app()
    except (TfxferError, Terminated) as error:
        print(f"tfxfer: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
