"""`sdlora-edge report`: one page that shows what a run did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import arguments
from .output import Json, emit, output

Out = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE", callback=output, help="Page to write. Default: report.html in the run."
    ),
]
Thumbnails = Annotated[
    bool,
    typer.Option(
        "--thumbnails", help="Embed a few confused test images. Loads and runs the model."
    ),
]


def report(
    run: arguments.Run = None, out: Out = None, thumbnails: Thumbnails = False, json: Json = False
) -> None:
    """Write a self-contained HTML page: scores, curves, matrices, classes, packets, settings."""
    from ..train import folder, plan

    path = run or folder.newest()
    page = out or path / "report.html"
    plan.report(path, page)
    from ..train.report import write  # jinja2 and numpy are loaded after the checks

    done = write(path, page, thumbnails)
    emit(done, json, lambda: [f"report: {done.report} ({done.bytes} bytes)"])
