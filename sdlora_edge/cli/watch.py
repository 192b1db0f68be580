"""`sdlora-edge device watch` and `device selftest`: what a device does on its own, for days or for a minute."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..device.watch import JsonLog, Watcher
from .output import Json, Store, emit, facts

_SHOWN = ("task", "task_name", "generation", "classes", "files", "counts", "trouble")


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where packets appear. It may be missing for a while.")],
    store: Store,
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, at files as they are, and end.")] = False,
    status: Annotated[Optional[Path], typer.Option(help="A JSON file to keep for monitoring; best in memory, as in /run.")] = None,
    json: Json = False,
) -> None:
    """Apply packets as they appear in a folder, until SIGTERM or Ctrl-C. Events go to stderr, one JSON line each.

    With --once, the exit code is that of the last packet that was refused, if any was.
    """
    logging.basicConfig(handlers=[JsonLog()], level=logging.WARNING, force=True)
    watcher = Watcher(folder, store, status)
    if not once:
        handlers = {s: signal.signal(s, lambda *_: watcher.stop()) for s in (signal.SIGTERM, signal.SIGINT)}
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
