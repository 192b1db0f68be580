"""`sdlora-edge report`: one page that shows what a run did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import arguments
from .output import Json, emit, output


def report(
    run: arguments.Run = None,
    out: Annotated[Optional[Path], typer.Option(callback=output, help="The page. Default: report.html in the run.")] = None,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help="Embed a few confused test images; else the page holds none.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Write one HTML page that shows what a run did.

    Scores, matrix, curves, magnitudes, classes, packets and settings.
    """
    from ..train import folder, plan

    path = run or folder.newest()
    page = out or path / "report.html"
    plan.report(path, page)
    from ..train.report.summary import write  # torch, which takes seconds, comes after the checks
    from ..train.run import Run

    value = write(Run.open(path), page, thumbnails)
    emit(value, json, lambda: [f"report: {value['report']} ({value['bytes']} bytes)"])
