"""`sdlora-edge export`: the bundle that devices start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import arguments
from .bundle import PROOF
from .output import Json, emit, facts, output


def export(
    run: arguments.Run = None,
    out: Annotated[
        Path,
        typer.Option(metavar="BUNDLE", callback=output, help="New folder for the bundle."),
    ] = Path("bundle"),
    task: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="State to export: 0 is before the first task. Default: the last."
        ),
    ] = None,
    trust: arguments.Trust = None,
    threshold: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Number of trusted keys that must sign a packet."),
    ] = 1,
    target: Annotated[
        str, typer.Option(metavar="onnx|executorch", help="What runs the model.")
    ] = "onnx",
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|fp16|int8|int8-dynamic",
            help="Precision of the weights that are not adapted. int8-dynamic: activations too.",
        ),
    ] = "fp32",
    encoding: Annotated[
        Optional[str],
        typer.Option(
            metavar=arguments.ENCODINGS, help="How packets carry factors. Default: the run's."
        ),
    ] = None,
    weights_as: Annotated[
        Optional[str],
        typer.Option(
            metavar="inputs|constants",
            help="How the model takes adapted weights. Default: the faster one.",
        ),
    ] = None,
    max_classes: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            min=1,
            help="Number of classes that the head has room for. Default: no limit with inputs, at "
            "least 1000 with constants.",
        ),
    ] = None,
    runs_in: Annotated[
        Optional[str],
        typer.Option(
            "--for",
            metavar="web",
            help="web: a bundle for browsers and Node. Python devices run it too.",
        ),
    ] = None,
    tolerance: arguments.Tolerance = None,
    min_agreement: arguments.MinAgreement = None,
    also: Annotated[
        Optional[str],
        typer.Option(
            metavar="onnx-adapter",
            help="Also write the merged weights as a file for the C and C++ API of ONNX Runtime.",
        ),
    ] = None,
    fleet_root: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="Root of trust of the fleet repository that devices will follow: its 1.root.json.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Export a run's model as a bundle, and prove that it computes what torch computes."""
    from ..export import requests as checks
    from ..train.folder import newest

    path = run or newest()
    checks.require_encoding(encoding)
    options = checks.ExportOptions(
        threshold,
        target,
        precision,
        weights_as,
        max_classes,
        tolerance,
        min_agreement,
        also,
        fleet_root,
        runs_in,
    )
    request = checks.BundleRequest(out, task, trust, options)
    keys = request.require(path)
    from ..export import bundles  # torch, which takes seconds, comes after the checks
    from ..train.run import Run

    opened = Run.open(path)
    opened = opened.encoded(encoding or opened.config.method.encoding)
    value = bundles.export(opened, request, keys)
    shown = value.to_dict() | {
        "capacity": value.capacity or "no limit",
        "trusted_keys": [key[:12] for key in value.trusted_keys],
    }
    emit(value, json, lambda: facts(shown, *_SHOWN, *PROOF))


_SHOWN = (
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
