"""`packet to-peft` and `packet from-peft`: trade adapters with the peft library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import arguments
from .output import Json, emit, facts, output


def to_peft(
    bundle: arguments.Bundle,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=output, help="New folder for the adapter.")
    ],
    packets: Annotated[
        Optional[list[Path]],
        typer.Argument(metavar="PACKET", help="Every packet after the bundle's task, in order."),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Only the last task's direction, without the head.")
    ] = False,
    after: arguments.After = None,
    json: Json = False,
) -> None:
    """Write a LoRA adapter that the peft library loads.

    It holds the whole update of the backbone's own weights, and the head.
    """
    from ..export.requests import require_new

    require_new(out)
    from ..export.peft import to_peft as write

    value = write(bundle, packets or [], out, alone, after or [])
    shown = (
        "adapter",
        "model",
        "task",
        "rank",
        "modules",
        "head",
        "classes",
        "magnitudes",
        "bytes",
    )
    where = (
        "applies to: the backbone before task 1 "
        "(backbone.safetensors of the run, or its published weights)"
    )
    emit(value, json, lambda: [*facts(value, *shown), where])


def from_peft(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="Folder with adapter_config.json and adapter_model.safetensors.",
        ),
    ],
    data: arguments.Data,
    run: arguments.Run = None,
    name: Annotated[
        Optional[str],
        typer.Option(metavar="NAME", help="Name of the task. Default: the adapter's."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a LoRA adapter the next task of a run.

    The adapter was trained elsewhere on the same backbone. The head is fitted to the images of
    --data; packet build then ships the task.
    """
    from ..train import folder, plan
    from .train import ROW_HEADS, accuracy_row

    path = run or folder.newest()
    plan.adapter(adapter, path)
    task = plan.one_more(path, data, name or adapter.resolve().name)
    from ..export.from_peft import add  # torch, which takes seconds, comes after the checks
    from ..train.trained import Trained

    done = add(adapter, task)
    emit(Trained.of(done), json, lambda: [ROW_HEADS, accuracy_row(done), f"run: {done.path}"])
