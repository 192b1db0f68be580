"""`export --for web`: weights are inputs without defaults, and everything else is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Fleet
from sdlora_edge.export import precision as precisions
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.errors import UsageError
from sdlora_edge.formats.bundle import PLAIN_INPUTS, open_bundle
from sdlora_edge.inputs import canary
from sdlora_edge.train.run import Run


def exported(fleet: Fleet, out: Path, **options: Any) -> Path:
    trust = [str(fleet.key.with_suffix(".pub"))]
    options = {"runs_in": "web", "min_agreement": 0.9, **options}
    export_bundle(Run.open(fleet.run), out, 0, trust, ExportOptions(**options))
    return out


@pytest.mark.long
@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_a_python_device_runs_it_and_takes_the_same_packets(
    fleet: Fleet, tmp_path: Path, precision: str
) -> None:
    bundle = exported(fleet, tmp_path / "bundle", precision=precision)
    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph
    weights = open_bundle(bundle).manifest.weights
    assert {"pictures", *weights} == {value.name for value in graph.input}
    assert not set(weights) & {tensor.name for tensor in graph.initializer}
    web = Device.init(bundle, tmp_path / "web")
    usual = ExportOptions(precision=precision, min_agreement=0.9)
    trust = [str(fleet.key.with_suffix(".pub"))]
    export_bundle(Run.open(fleet.run), tmp_path / "usual", 0, trust, usual)
    python = Device.init(tmp_path / "usual", tmp_path / "python")
    inputs = canary.inputs(7, Run.open(fleet.run).preprocessing, 4)
    for packet in fleet.packets:
        web.apply(packet)
        python.apply(packet)
        np.testing.assert_allclose(web.logits(inputs), python.logits(inputs), atol=1e-5)


def test_the_command_and_bundle_inspect_say_so(
    fleet: Fleet, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    public = fleet.key.with_suffix(".pub")
    out = tmp_path / "bundle"
    done = cli("export", "--run", fleet.run, "--trust", public, "--for", "web", "--out", out)
    assert done.code == 0, done.err
    assert PLAIN_INPUTS in cli("bundle", "inspect", "--bundle", out).out
    assert cli("bundle", "check", "--bundle", out, "--run", fleet.run).code == 0


@pytest.mark.parametrize(
    "options",
    [
        {"runs_in": "phone"},
        {"weights_as": "inputs"},
        {"also": "onnx-adapter"},
        {"target": "executorch"},
    ],
)
def test_it_excludes_what_it_decides(fleet: Fleet, tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--for"):
        exported(fleet, tmp_path / "bundle", **options)
