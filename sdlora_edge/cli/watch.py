"""`sdlora-edge device watch` and `device selftest`: what a device does on its own; and what the host records for it."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..device.watch.events import JsonLog
from ..device.watch.service import Watcher
from ..errors import HealthError, UsageError
from .output import Json, Store, completing, emit, facts, output, say, spaced

_SHOWN = ("task", "task_name", "generation", "classes", "files", "counts", "trouble")


def watch(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where packets appear. It may be missing for a while."),
    ],
    store: Store,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, at files as they are, and end.")
    ] = False,
    status: Annotated[
        Optional[Path],
        typer.Option(
            callback=output, help="A JSON file to keep for monitoring; best in memory, as in /run."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Apply packets as they appear in a folder, until SIGTERM or Ctrl-C. Events go to stderr, one JSON line each.

    With --once, the exit code is that of the last packet that was refused, if any was.
    """
    logging.basicConfig(handlers=[JsonLog()], level=logging.WARNING, force=True)
    watcher = Watcher(folder, store, status)
    if not once:
        handlers = {
            s: signal.signal(s, lambda *_: watcher.stop()) for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            watcher.run(interval)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return
    report = watcher.look(settled=False)
    emit(report, json, lambda: facts(report, *_SHOWN))
    if error := report["last_error"]:
        raise typer.Exit(error["exit_code"])


def selftest(
    bundle: Annotated[Path, typer.Option(help="The bundle that devices are flashed with.")],
    packets: Annotated[Path, typer.Option(help="A folder with packets that follow from it.")],
    expected: Annotated[
        Optional[Path], typer.Option(help="What sdlora-edge expect recorded on the host.")
    ] = None,
    store: Annotated[
        Optional[Path],
        typer.Option(
            callback=output, help="A folder on the disk to test. Default: where temporary files go."
        ),
    ] = None,
    report: Annotated[
        Optional[Path], typer.Option(callback=output, help="The JSON file to send back.")
    ] = None,
    json: Json = False,
) -> None:
    """Check this very device, in a scratch store: signatures, equality with the host, updates under load, kills, times, memory."""
    from ..selftest.checks import CHECKS, Report, open_kit

    if report is not None and report.is_dir():
        raise UsageError(
            f"--report {report} is a folder: name a file, such as {report / 'report.json'}"
        )
    found = Report()
    keep: Callable[[], None] = functools.partial(found.write, report) if report else lambda: None
    with completing(done := found.value()), open_kit(bundle, packets, expected, store) as kit:
        keep()  # before checks that take minutes: it may not be writable
        for name in CHECKS:
            try:
                with contextlib.suppress(
                    Exception
                ):  # whatever it was, the report holds it, and the other checks go on
                    found.check(name, kit)
            finally:
                say(f"{name}: {'passed' if done['checks'][name]['passed'] else 'FAILED'}", err=True)
                keep()
    value = found.value()
    emit(
        value,
        json,
        lambda: spaced([[name, *facts(check, *check)] for name, check in value["checks"].items()]),
    )
    if not value["passed"]:
        raise typer.Exit(HealthError.exit_code)


def expect(
    images: Annotated[
        Path,
        typer.Argument(
            help="A folder of images, of the place where devices work; never training images."
        ),
    ],
    run: Annotated[Optional[Path], typer.Option(help="The run. Default: runs/latest.")] = None,
    out: Annotated[
        Path, typer.Option(callback=output, help="The new folder to copy to devices.")
    ] = Path("expected"),
    json: Json = False,
) -> None:
    """Record what this host answers, in every state of a run, for device selftest to compare with."""
    from ..export.requests import expectation
    from ..train.folder import newest

    path = run or newest()
    expectation(path, images, out)
    from ..export.expected import record  # torch, which takes seconds, comes after the checks
    from ..train.run import Run

    value = record(Run.open(path), images, out)
    emit(value, json, lambda: facts(value, *value))
