"""slipstream: the entry point. Verbs are light; torch is imported inside the one that needs it."""

from __future__ import annotations

import errno
import sys

import typer

from slipstream import __version__
from slipstream.cli import bench, check, compare, doctor, export, generate, list_, new_mixer, quantise, show, train
from slipstream.core.errors import InputError

app = typer.Typer(
    name="slipstream",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Every efficient sequence architecture under one contract: compare, train, stream, on your own data.\n\n"
    'Examples:\n\n  slipstream compare book.txt --budget 5m\n\n  slipstream train book.txt --arch "3*gated_deltanet, attention"\n\n'
    '  slipstream generate runs/book "Once upon"',
)
for module in (list_, show, check, new_mixer, doctor, train, generate, quantise, export, bench, compare):
    module.add(app)


@app.callback(invoke_without_command=True)
def version(show_version: bool = typer.Option(False, "--version", help="print the version and stop")) -> None:
    if show_version:
        typer.echo(f"slipstream {__version__}")
        raise typer.Exit


def main() -> None:
    """Run; a mistake of the user's is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    try:
        app()
    except InputError as error:
        sys.exit(_say(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped; the same command goes on from here", 130))
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EROFS: "the folder is read-only",
            errno.EACCES: "no permission to write",
        }
        sys.exit(
            _say(f"{reasons.get(error.errno or 0, error.strerror or error)}: {error.filename or ''}".rstrip(": "), 2)
        )


def _say(message: str, code: int) -> int:
    print(f"slipstream: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
