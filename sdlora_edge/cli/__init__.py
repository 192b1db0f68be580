"""The command line: typer commands, a file for each group, no logic of their own.

Results go to stdout, progress and logs to stderr; the exit codes stand in `sdlora_edge.errors`. With --json stdout holds one JSON
object, whatever happens: {"error": {"message", "exit_code"}} beside what was done before the error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Optional

import typer

from .. import __version__
from ..errors import ResourceError, SdloraError, printable

try:
    from ..shortage import shortage
    from . import bundle, demo, device, eval, export, keys, output, packet, report, train, watch
    from .terminal import OneLine, terminal
except SdloraError as error:  # this platform lacks what every command needs
    typer.echo(f"error: {error}", err=True)
    raise SystemExit(error.exit_code) from error

# click's ClickException: the root of what typer raises for wrong arguments, whichever click it carries
_ArgumentError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("report")(report.report)
app.command("export")(export.export)
app.add_typer(keys.app, name="keys")
app.add_typer(bundle.app, name="bundle")
app.add_typer(packet.app, name="packet")
device.app.command("watch")(watch.watch)
device.app.command("selftest")(watch.selftest)
app.command("expect")(watch.expect)
app.add_typer(device.app, name="device")
app.command("demo")(demo.demo)


def _version(value: bool) -> None:
    if value:
        output.say(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        Optional[bool],
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Teach a fleet of edge devices new classes: train on a workstation, ship signed packets of less than a megabyte."""
    logging.getLogger("sdlora_edge").setLevel(logging.DEBUG if debug else logging.INFO)


@terminal()
def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: one line on stderr for an error, a traceback only with --debug; with --json the
    error is on stdout, too. Output that cannot be written stops no command, and is its own error in the end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    output.lost.clear()
    code = _run(arguments)
    if not output.lost:
        return code
    with contextlib.suppress(
        OSError, ValueError
    ):  # what is still buffered would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    done = "what was asked for is done" if code == 0 else f"the command ended with {code}"
    output.say(f"error: {done}, but its output is lost: {output.lost[0].strerror}", err=True)
    return code or ResourceError.exit_code


def _run(arguments: list[str]) -> int:
    warnings.filterwarnings(
        "ignore", "Image size .* exceeds limit"
    )  # Pillow's; ours is lower, and an error
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)  # on one line each, as any record
    try:
        result = app(arguments, prog_name="sdlora-edge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            # marked, so that no message in it looks like a line of ours
            output.say(*(f"| {line}" for line in traceback.format_exc().splitlines()), err=True)
        done, cause = (
            (error.done, error.__cause__) if isinstance(error, output.Incomplete) else ({}, error)
        )
        code, message = _explain(cause or error)
        if isinstance(error, _ArgumentError):
            error.message = printable(error.message)  # type: ignore[attr-defined]
            error.show()  # type: ignore[attr-defined]
        else:
            output.say(message if code in (1, 130) else f"error: {message}", err=True)
        if "--json" in arguments:
            output.emit({**done, "error": {"message": message, "exit_code": code}}, True, list)
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one line)."""
    if isinstance(error, _ArgumentError):
        return 2, error.format_message()  # type: ignore[attr-defined]
    if isinstance(known := shortage(error) or error, SdloraError):
        return known.exit_code, str(known)
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return (
            130,
            "interrupted: what was recorded is whole; a run goes on with sdlora-edge train --run RUN",
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            2,
            f"this command needs {error.name}, which is not installed: run pip install 'sdlora-edge[host]'",
        )
    return 1, f"internal error: {error!r}: please report it; --debug before the command shows where"
