"""The command line: typer commands, a file for each group, no logic of their own.

Results go to stdout, progress and logs to stderr; the exit codes stand in `sdlora_edge.errors`.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from typing import Annotated, Optional

import typer

from .. import __version__
from ..errors import SdloraError
from . import bundle, demo, device, eval, export, keys, packet, report, train, watch

# click's ClickException: the root of what typer raises for wrong arguments, whichever click it carries
_ArgumentError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
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
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        Optional[bool], typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    """Teach a fleet of edge devices new classes: train on a workstation, ship signed packets of less than a megabyte."""
    logging.getLogger("sdlora_edge").setLevel(logging.DEBUG if debug else logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: one line on stderr for an error, a traceback only with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's; ours is lower, and an error
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    try:
        result = app(arguments, prog_name="sdlora-edge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _ArgumentError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = _explain(error)
        typer.echo(" ".join(message.split()), err=True)
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one line)."""
    if isinstance(error, SdloraError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return 130, "interrupted: what was recorded is whole; a run goes on with sdlora-edge train --run RUN"
    if isinstance(error, ModuleNotFoundError):
        return 2, f"error: this command needs {error.name}, which a device has not: pip install 'sdlora-edge[host]'"
    return 1, f"internal error: {error!r}: please report it; --debug before the command shows where"
