"""`sdlora-edge export`: the bundle that devices are flashed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..formats.bundle import open_bundle
from .output import Json, emit, facts, output


def export(
    target: Annotated[str, typer.Option(help="onnx or executorch")] = "onnx",
    run: Annotated[Optional[Path], typer.Option(help="The run. Default: runs/latest.")] = None,
    task: Annotated[Optional[int], typer.Option(help="The state to export: 0 is before the first task. Default: the last.")] = None,
    encoding: Annotated[Optional[str], typer.Option(help="How its packets carry factors: fp32, fp16, int8 or int4. Default: the run's.")] = None,
    trust: Annotated[Optional[list[str]], typer.Option(help="Public key, once for each: a file, or NAME for keys/NAME.pub. Default: the only one in keys/.")] = None,
    threshold: Annotated[int, typer.Option(min=1, help="How many of these keys must have signed a packet.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8 (weights) or int8-dynamic (activations too), of what is not adapted.")] = "fp32",
    weights_as: Annotated[Optional[str], typer.Option(help="inputs or constants. Default: what serves faster.")] = None,
    max_classes: Annotated[Optional[int], typer.Option(min=1, help="Room in the head. Default: any number with inputs, else 1000 or more.")] = None,
    tolerance: Annotated[Optional[float], typer.Option(min=0, help="Largest logit difference to torch that export accepts. Default: the precision's.")] = None,
    min_agreement: Annotated[Optional[float], typer.Option(min=0, max=1, help="Share of test images that must get the same class as in torch. Default: the precision's.")] = None,
    also: Annotated[Optional[str], typer.Option(help="onnx-adapter: the merged weights as a file for ONNX Runtime's C and C++ API, beside the bundle.")] = None,
    check: Annotated[Optional[Path], typer.Option(help="Write nothing: compare this bundle with the run again.")] = None,
    out: Annotated[Path, typer.Option(callback=output, help="The bundle's folder.")] = Path("bundle"),
    json: Json = False,
) -> None:  # fmt: skip
    """Export a run's model as a bundle, and prove that it computes what torch computes."""
    from ..export import requests as checks
    from ..train.folder import newest

    path = run or newest()
    request = checks.BundleRequest(
        out,
        task,
        trust,
        threshold,
        target,
        precision,
        weights_as,
        max_classes,
        tolerance,
        min_agreement,
        also,
    )
    checks.require_encoding(encoding)
    if check is None:
        request.require(path)
    else:
        request.require_only_bounds()
        checks.require_same_run(open_bundle(check), path)
    from ..export.bundles import (  # torch, which takes seconds, comes after the checks
        check_bundle,
        export_bundle,
    )
    from ..train.run import Run

    opened = Run.open(path)
    opened = opened.encoded(encoding or opened.config.method.encoding)
    proof = ("images", "agreement", "largest_difference", "largest_logit")
    if check is not None:
        value = {
            "bundle": str(check),
            **check_bundle(opened, check, tolerance, min_agreement).to_dict(),
        }
        emit(value, json, lambda: facts(value, "bundle", *proof))
        return
    value = export_bundle(
        opened, out, task, trust, threshold,
        target=target, precision=precision, weights_as=weights_as, max_classes=max_classes,
        tolerance=tolerance, min_agreement=min_agreement, also=also,
    )  # fmt: skip
    made = (
        "bundle",
        "task",
        "classes",
        "target",
        "precision",
        "weights_as",
        "capacity",
        "model_bytes",
        "trusted_keys",
    )
    emit(value, json, lambda: facts(value, *made, *proof))
