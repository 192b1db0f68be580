"""`device watch` and `device selftest`, and `expect`, which records on the host for `selftest`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import HealthError, UsageError
from . import arguments, sync
from .output import Json, completing, emit, facts, fields, output, say, spaced

_SHOWN = ("task", "task_name", "generation", "classes", "files", "counts", "trouble")


def watch(
    store: arguments.Store,
    folder: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="FOLDER", help="Folder where packets appear. It may be missing at times."
        ),
    ] = None,
    url: sync.From = None,
    interval: Annotated[
        Optional[float],
        typer.Option(
            metavar="SECONDS",
            help="Seconds between two looks. Default: 5 at a folder, 300 at a repository.",
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, at files as they are now, and end.")
    ] = False,
    status: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            callback=output,
            help="JSON file to keep up to date for monitoring. Put it in memory, as in /run.",
        ),
    ] = None,
    report_every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="With --from: seconds between two reports if nothing changes.",
        ),
    ] = 3600,
    max_rate: sync.MaxRate = 0,
    proxy: sync.Proxy = None,
    ca: sync.Ca = None,
    client_cert: sync.ClientCert = None,
    client_key: sync.ClientKey = None,
    json: Json = False,
) -> None:
    """Apply packets as they appear in a folder or a repository, until SIGTERM or Ctrl-C.

    Name a folder, or a fleet repository with --from. Events go to stderr, one JSON line each. With
    --once, the exit code is that of the last packet that was refused, or 0.
    """
    from ..device.watch import service
    from ..device.watch.events import JsonLog

    logging.basicConfig(handlers=[JsonLog()], level=logging.WARNING, force=True)
    if (folder is None) == (url is None):
        raise UsageError("device watch needs one place to look at: name a FOLDER, or --from URL")
    if folder is None:
        if once:
            raise UsageError("--from looks again and again: to look once, use device sync")
        link = sync.link_of(max_rate, proxy, ca, client_cert, client_key)
        sync.follow(
            (store, url, link), (300.0 if interval is None else interval, report_every), status
        )
        return
    if not once:
        service.watch(folder, store, 5.0 if interval is None else interval, status)
        return
    report = service.Watcher(folder, store, status).look(settled=False)
    emit(report, json, lambda: facts(report, *_SHOWN))
    if report.last_error:
        raise typer.Exit(report.last_error.exit_code)


def selftest(
    bundle: arguments.Bundle,
    packets: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder with packets that follow from the bundle."),
    ],
    expected: Annotated[
        Optional[Path],
        typer.Option(metavar="FOLDER", help="Folder that sdlora-edge expect recorded on the host."),
    ] = None,
    scratch: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            callback=output,
            help="Folder on the disk to test. Default: where temporary files go.",
        ),
    ] = None,
    report: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", callback=output, help="JSON file to send back."),
    ] = None,
    json: Json = False,
) -> None:
    """Check this device in a scratch store.

    Signatures, equality with the host, unknown images, updates under load, kills, times and memory.
    """
    from ..selftest.checks import SelftestReport, run
    from ..selftest.kit import open_kit

    if report is not None and report.is_dir():
        raise UsageError(
            f"--report {report} is a folder: name a file, such as {report / 'report.json'}"
        )
    done: dict[str, Any] = {"passed": False, "checks": {}}

    def keep(so_far: SelftestReport) -> None:
        done.update(so_far.to_dict(), passed=False)  # shown only beside an error
        if so_far.checks:
            name, last = list(so_far.checks.items())[-1]
            say(f"{name}: {'passed' if last.passed else 'FAILED'}", err=True)
        if report is not None:
            so_far.write(report)

    with completing(done), open_kit(bundle, packets, expected, scratch) as kit:
        found = run(kit, keep)
    emit(
        found,
        json,
        lambda: spaced([[name, *facts(check, *check)] for name, check in done["checks"].items()]),
    )
    if not found.passed:
        raise typer.Exit(HealthError.exit_code)


def expect(
    images: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of images from the place where devices work. Never use training images.",
        ),
    ],
    run: arguments.Run = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=output, help="New folder to copy to devices.")
    ] = Path("expected"),
    max_megapixels: arguments.MaxMegapixels = arguments.MEGAPIXELS,
    json: Json = False,
) -> None:
    """Record what this host answers in every state of a run, for device selftest to compare."""
    from ..export.requests import expectation
    from ..train.folder import newest

    path = run or newest()
    expectation(path, images, out)
    from ..export.expected import record  # torch, which takes seconds, comes after the checks
    from ..train.run import Run

    value = record(Run.open(path), images, out, max_megapixels * 10**6)
    emit(value, json, lambda: facts(value, *fields(value)))
