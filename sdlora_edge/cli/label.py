"""`sdlora-edge label`: unknown images become the folder of a new task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import UsageError
from . import arguments
from .output import Json, emit, facts, fields, output, say


def label(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder of images, such as those of --keep-unknown."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            callback=output,
            help="New folder to write, one folder for each class.",
        ),
    ],
    run: arguments.Run = None,
    bundle: Annotated[
        Optional[Path],
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            help="Bundle whose model groups the images, without torch.",
        ),
    ] = None,
    distance: Annotated[
        float,
        typer.Option(
            metavar="X", min=0, max=2, help="Distance up to which images form a group. Less: more."
        ),
    ] = 0.8,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port. 0 takes a free one.")
    ] = 0,
    json: Json = False,
) -> None:
    """Sort unknown images into classes, on a page in your browser.

    The page is open to this machine only. FOLDER is never changed.
    """
    from ..label.sorting import Request, sorted_by_hand

    if run is not None and bundle is not None:
        raise UsageError("--run and --bundle both name a model: give one of them")
    value = sorted_by_hand(
        Request(folder, out, run, bundle, distance, port), lambda line: say(line, err=True)
    )
    emit(value, json, lambda: facts(value, *fields(value)))
