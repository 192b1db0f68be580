"""The .onnx_adapter file: any ONNX Runtime program gets the device's outputs from the bundle's own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import Fleet, Result

from sdlora_edge.device import Device
from sdlora_edge.device.adapter import export_adapter, write_adapter
from sdlora_edge.errors import UsageError
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.current import Current
from sdlora_edge.storage import disk

Cli = Callable[..., Result]


def images() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((3, 3, 16, 16)).astype(np.float32)


def run_plainly(bundle: Path, adapter: Path | None) -> np.ndarray:
    """A plain session, as the other languages have it: no IOBinding, nothing of this package."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    run = ort.RunOptions()
    if adapter:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        run.add_active_adapter(loaded)
    (found,) = session.run(["logits"], {"pictures": images()}, run)
    return np.asarray(found)


def test_a_plain_session_gets_the_devices_outputs_after_each_packet(
    fleet: Fleet, store: Path, cli: Cli, tmp_path: Path
) -> None:
    before, out = run_plainly(fleet.bundle, None), tmp_path / "new" / "current.onnx_adapter"
    for task, path in enumerate([None, *fleet.packets]):
        if path:
            assert cli("device", "apply", path, "--store", store).code == 0
        result = cli("device", "export-adapter", "--store", store, "--out", out, "--json")
        assert result.code == 0, result
        device, shown = Device.open(store), json.loads(result.out)
        found = run_plainly(fleet.bundle, out)
        assert found.shape == (3, len(shown["classes"]))
        np.testing.assert_allclose(found, device.logits(images()), atol=1e-6)
        assert (shown["task"], shown["bytes"]) == (task, out.stat().st_size)
        assert ort.AdapterFormat.read_adapter(str(out)).get_adapter_version() == task
        current = Current.read(out.parent)
        assert current is not None
        assert (current.task, current.state) == (task, device.status().state)
        assert (current.lineage, list(current.classes)) == (
            device.status().lineage,
            shown["classes"],
        )
        assert current.files == {out.name: sha256(out.read_bytes())}
    assert found.shape[1] > before.shape[1]  # more classes than it was exported with
    assert {p.name for p in out.parent.iterdir()} == {out.name, "current.json"}


def test_other_precisions_and_other_bundles(fleet: Fleet, tmp_path: Path) -> None:
    """float16 weights, and an adapter whose model has room for a fixed number of classes; constants take none."""
    from sdlora_edge.export.bundles import export_bundle
    from sdlora_edge.export.requests import ExportOptions

    from sdlora_edge.train.run import Run

    keys = [str(fleet.key.with_suffix(".pub"))]
    export_bundle(
        Run.open(fleet.run),
        tmp_path / "half",
        1,
        keys,
        ExportOptions(precision="fp16", max_classes=20),
    )
    device = Device.init(tmp_path / "half", tmp_path / "store")
    for path in fleet.packets[1:]:
        device.apply(path)
    shown, out = export_adapter(device, tmp_path / "a.onnx_adapter"), tmp_path / "a.onnx_adapter"
    found, known = run_plainly(tmp_path / "half", out), len(shown.classes)
    np.testing.assert_allclose(found[:, :known], device.logits(images()), atol=1e-5)
    assert (found[:, known:] < -1e4).all()  # rows without a class can never win
    read = ort.AdapterFormat.read_adapter(str(out))
    assert (read.get_adapter_version(), read.get_model_version()) == (3, 1)
    constants = replace(
        device.bundle, manifest=replace(device.bundle.manifest, weights_as="constants")
    )
    state, weights = device.current()
    with pytest.raises(UsageError, match="--weights-as inputs"):
        write_adapter(constants, weights, state, tmp_path / "b.onnx_adapter")
    assert not (tmp_path / "b.onnx_adapter").exists()


def test_it_is_written_whole_or_not_at_all(
    store: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "current.onnx_adapter"
    out.write_bytes(b"the one before")

    def power_cut(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(disk.os, "replace", power_cut)
        assert cli("device", "export-adapter", "--store", store, "--out", out).code == 130
    assert out.read_bytes() == b"the one before"
    (tmp_path / "file").touch()
    refused = cli(
        "device", "export-adapter", "--store", store, "--out", tmp_path / "file" / "a.onnx_adapter"
    )
    assert (refused.code, "cannot be written" in refused.err) == (3, True)
