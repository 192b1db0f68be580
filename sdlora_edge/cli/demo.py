"""`sdlora-edge demo`: the whole loop on the built-in digits, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, answered, emit, output, say
from .train import accuracy_row


def demo(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            callback=output,
            help="New folder for the run, keys, bundle, packets and store.",
        ),
    ] = Path("demo"),
    json: Json = False,
) -> None:
    """Run the whole loop on built-in digits.

    Train four tasks, export after the first, ship the others as packets, and compare host and
    device.
    """
    from ..demo import run_demo

    value = run_demo(out, lambda run: None if json else say(accuracy_row(run)))
    line = (
        f"demo: host accuracy {value.host_accuracy:.3f}, "
        f"device accuracy {value.device_accuracy:.3f}, {value.packets} packets, "
        f"{value.packet_bytes} bytes shipped, model {value.model_bytes} bytes"
    )
    lines = [line] + ([f"demo: an image of noise: {answered(value.noise)}"] if value.noise else [])
    emit(value.to_dict(), json, lambda: lines)
