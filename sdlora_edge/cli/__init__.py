"""The command line: typer commands, one file for each group, no logic of their own.

Results go to stdout, progress and logs to stderr. `sdlora_edge.errors` lists the exit codes. With
--json, stdout holds one JSON object whatever happens: an error is {"error": {"message",
"exit_code"}}, beside what was done before it.

The files of this package import nothing heavy at the top: --help answers before numpy is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, Optional

import typer

from .. import __version__
from ..errors import ResourceError, SdloraError, printable
from ..progress import watching
from ..shortage import shortage

try:
    from . import (
        bundle,
        collector,
        demo,
        device,
        eval,
        export,
        fleet,
        identity,
        keys,
        label,
        output,
        packet,
        peft,
        report,
        rollout,
        run,
        stages,
        terminal,
        train,
        watch,
    )
    from .help import CONTEXT, Command, Group
except SdloraError as error:  # this platform lacks what every command needs
    typer.echo(f"error: {error}", err=True)
    raise SystemExit(error.exit_code) from error

# ClickException, the root of what typer raises for wrong arguments, of whichever click it carries
_ArgumentError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
COMPLETE = "_SDLORA_EDGE_COMPLETE"
"""The variable by which a shell asks for completions."""
_EXTRAS = {
    "agent": (
        "paho",
        "prometheus_client",
        "python_multipart",
        "starlette",
        "tuf",
        "urllib3",
        "uvicorn",
    ),
    "fleet": ("alembic", "sqlalchemy"),
}
"""Modules of each extra; those of all others are the host's."""

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
)
app.command("train", cls=Command)(train.train)
app.command("eval", cls=Command)(eval.evaluate)
app.command("report", cls=Command)(report.report)
app.command("label", cls=Command)(label.label)
app.command("export", cls=Command)(export.export)
app.add_typer(keys.app, name="keys")
app.add_typer(bundle.app, name="bundle")
packet.app.command("to-peft", cls=Command)(peft.to_peft)
packet.app.command("from-peft", cls=Command)(peft.from_peft)
app.add_typer(packet.app, name="packet")
device.app.command("run", cls=Command)(run.run)
device.app.command("watch", cls=Command)(watch.watch)
device.app.command("configure", cls=Command)(identity.configure)
device.app.command("identity", cls=Command)(identity.identity)
device.app.command("report", cls=Command)(identity.report)
device.app.command("selftest", cls=Command)(watch.selftest)
app.command("expect", cls=Command)(watch.expect)
app.add_typer(device.app, name="device")
fleet.app.add_typer(rollout.app, name="rollout")
fleet.app.command("serve", cls=Command)(collector.serve)
fleet.app.command("enroll", cls=Command)(collector.enroll)
fleet.app.command("devices", cls=Command)(collector.devices)
app.add_typer(fleet.app, name="fleet")
app.command("demo", cls=Command)(demo.demo)


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
    """Teach a fleet of edge devices new classes.

    Train on a workstation, ship signed packets of less than a megabyte.
    """
    logging.getLogger("sdlora_edge").setLevel(logging.DEBUG if debug else logging.INFO)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    An error is one line on stderr, with a traceback only after --debug; with --json it is on stdout
    too. Output that cannot be written stops no command: it is an error of its own at the end.
    """
    if COMPLETE in os.environ:
        app(prog_name="sdlora-edge")  # the shell reads the answer: it ends the process
    with terminal.terminal():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> int:
    output.lost.clear()
    code = _run(arguments)
    if not output.lost:
        return code
    # what is still buffered would fail again when Python ends
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    done = "the command did its work" if code == 0 else f"the command ended with {code}"
    output.say(f"error: {done}, but its output is lost: {output.lost[0].strerror}", err=True)
    return code or ResourceError.exit_code


def _run(arguments: list[str]) -> int:
    # Pillow's warning; our own limit is lower, and an error
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    handler = logging.StreamHandler()
    handler.setFormatter(terminal.OneLine("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)  # on one line each, as any record
    app.rich_markup_mode = "rich" if terminal.fancy(sys.stdout) else None
    try:
        with watching(stages.show):
            result = app(arguments, prog_name="sdlora-edge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, arguments)


def _failed(error: BaseException, arguments: list[str]) -> int:
    """Report an error, and return its exit code."""
    if "--debug" in arguments:
        # marked, so that no message in it looks like a line of ours
        output.say(*(f"| {line}" for line in traceback.format_exc().splitlines()), err=True)
    done: dict[str, Any] = {}
    if isinstance(error, output.Incomplete):
        done, error = error.done, error.__cause__ or error
    code, message = _explain(error)
    if isinstance(error, _ArgumentError):
        _show_usage(error)
    else:
        output.say(message if code in (1, 130) else f"error: {message}", err=True)
    if "--json" in arguments:
        output.emit({**done, "error": {"message": message, "exit_code": code}}, True, list)
    return code


def _show_usage(error: Any) -> None:
    """Show a wrong argument as typer does, or the help of a group that lacks a command."""
    if type(error).__name__ == "NoArgsIsHelpError":
        output.say(*error.message.splitlines(), err=True)
        return
    error.message = printable(error.message)
    if not terminal.fancy(sys.stderr):
        error.show()
        return
    from rich.panel import Panel
    from rich.text import Text

    if error.ctx is not None:
        output.say(error.ctx.get_usage(), err=True)
        output.say(f"Try '{error.ctx.command_path} --help' for help.", err=True)
    panel = Panel(
        Text(error.format_message()), title="Error", title_align="left", border_style="red"
    )
    terminal.console(sys.stderr).print(panel)


def _extra(module: str) -> str:
    """The extra of this package that a module belongs to."""
    package = module.partition(".")[0]
    return next((extra for extra, names in _EXTRAS.items() if package in names), "host")


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line that says what is wrong."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2, "a command is missing: --help lists them"
    if isinstance(error, _ArgumentError):
        return 2, error.format_message()
    if isinstance(known := shortage(error) or error, SdloraError):
        return known.exit_code, str(known)
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return 130, (
            "interrupted: what was already written is intact; to continue a run, "
            "use sdlora-edge train --run RUN"
        )
    if isinstance(error, ModuleNotFoundError):
        return 2, (
            f"this command needs {error.name}, which is not installed: "
            f"run pip install 'sdlora-edge[{_extra(error.name or '')}]'"
        )
    return 1, (
        f"internal error: {error!r}: please report it; --debug before the command shows where it is"
    )
