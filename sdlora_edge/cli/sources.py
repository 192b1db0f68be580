"""The options of `device run` for cameras, places that take answers, and unknown images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .output import output

if TYPE_CHECKING:
    from ..agent.attaching import Wanted

PANEL = "Cameras and unknown images"
Camera = Annotated[
    Optional[list[str]],
    typer.Option(
        "--camera",
        metavar="CAMERA",
        help="Camera to answer: a number, rtsp://..., http://..., a video file, or a folder of "
        "images. Repeat it for several.",
        rich_help_panel=PANEL,
    ),
]
Interval = Annotated[
    float,
    typer.Option(
        "--interval",
        metavar="SECONDS",
        min=0,
        help="Seconds between two images of a camera. 0 takes each one.",
        rich_help_panel=PANEL,
    ),
]
Answers = Annotated[
    Optional[list[str]],
    typer.Option(
        "--answers",
        metavar="PLACE",
        help="Where the answers to cameras go: -, mqtt://BROKER/TOPIC, or https://HOST/PATH. "
        "Repeat it for several. Default: - (stdout).",
        rich_help_panel=PANEL,
    ),
]
KeepUnknown = Annotated[
    Optional[Path],
    typer.Option(
        "--keep-unknown",
        metavar="FOLDER",
        callback=output,
        help="Folder to keep unknown images in, until you bring them home. Nothing is sent.",
        rich_help_panel=PANEL,
    ),
]
KeepMb = Annotated[
    float,
    typer.Option(
        "--keep-mb",
        metavar="MB",
        min=1,
        help="Megabytes of unknown images to keep. The oldest are removed.",
        rich_help_panel=PANEL,
    ),
]
KeepPerDay = Annotated[
    int,
    typer.Option(
        "--keep-per-day",
        metavar="N",
        min=1,
        help="Most unknown images to keep in a day.",
        rich_help_panel=PANEL,
    ),
]
Blur = Annotated[
    Optional[str],
    typer.Option(
        "--blur",
        metavar="MODULE:FUNCTION",
        help="Python function that gets a Pillow image and returns the one to keep, such as one "
        "with blurred faces.",
        rich_help_panel=PANEL,
    ),
]


def wanted(
    camera: Camera,
    interval: Interval,
    answers: Answers,
    keep_unknown: KeepUnknown,
    keep_mb: KeepMb,
    keep_per_day: KeepPerDay,
    blur: Blur,
) -> Wanted:
    """These options as one value. Raises UsageError if they do not fit together."""
    from ..agent.attaching import Wanted

    return Wanted(
        tuple(camera or ()),
        interval,
        tuple(answers or ()),
        keep_unknown=keep_unknown,
        keep_mb=keep_mb,
        keep_per_day=keep_per_day,
        blur=blur,
    )
