"""`sdlora-edge export`: the bundle that devices are flashed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .output import Json, emit, facts


def export(
    target: Annotated[str, typer.Option(help="onnx")] = "onnx",
    run: Annotated[Optional[Path], typer.Option(help="The run. Default: runs/latest.")] = None,
    task: Annotated[Optional[int], typer.Option(help="The state to export: 0 is before the first task. Default: the last.")] = None,
    trust: Annotated[Optional[list[str]], typer.Option(help="Public key, once for each: a file, or NAME for keys/NAME.pub. Default: the only one in keys/.")] = None,
    threshold: Annotated[int, typer.Option(min=1, help="How many of these keys must have signed a packet.")] = 1,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest logit difference to torch that export accepts.")] = 1e-4,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("bundle"),
    json: Json = False,
) -> None:  # fmt: skip
    """Export a run's model as a bundle, and prove that it computes what torch computes."""
    from ..errors import UsageError
    from ..export.onnx import export_onnx
    from ..train.run import Run, newest

    if target != "onnx":
        raise UsageError(f"target {target!r} is unknown: this version exports onnx")
    value = export_onnx(Run.open(run or newest()), out, task, trust, threshold, tolerance)
    emit(
        value,
        json,
        lambda: facts(value, "bundle", "task", "classes", "model_bytes", "trusted_keys", "pictures", "largest_difference"),
    )
