"""The .onnx_adapter file: any ONNX Runtime program gets the device's outputs from the bundle's own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import Fleet, Result

from sdlora_edge import files
from sdlora_edge.device import Device
from sdlora_edge.device.adapter import export_adapter

Cli = Callable[..., Result]


def pictures() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((3, 3, 16, 16)).astype(np.float32)


def run_plainly(bundle: Path, adapter: Path | None) -> np.ndarray:
    """A plain session, as the other languages have it: no IOBinding, nothing of this package."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    run = ort.RunOptions()
    if adapter:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        run.add_active_adapter(loaded)
    (found,) = session.run(["logits"], {"pictures": pictures()}, run)
    return np.asarray(found)


def test_a_plain_session_gets_the_devices_outputs_after_each_packet(fleet: Fleet, store: Path, cli: Cli, tmp_path: Path) -> None:
    before, out = run_plainly(fleet.bundle, None), tmp_path / "new" / "current.onnx_adapter"
    for task, path in enumerate([None, *fleet.packets]):
        if path:
            assert cli("device", "apply", path, "--store", store).code == 0
        result = cli("device", "export-adapter", "--store", store, "--out", out, "--json")
        assert result.code == 0, result
        device, shown = Device.open(store), json.loads(result.out)
        found = run_plainly(fleet.bundle, out)
        assert found.shape == (3, len(shown["classes"]))
        np.testing.assert_allclose(found, device.logits(pictures()), atol=1e-6)
        assert (shown["task"], shown["bytes"]) == (task, out.stat().st_size)
        assert ort.AdapterFormat.read_adapter(str(out)).get_adapter_version() == task
    assert found.shape[1] > before.shape[1]  # more classes than it was exported with
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_later_bundle_gives_the_same_outputs(fleet: Fleet, store: Path, tmp_path: Path) -> None:
    """The adapter holds merged weights, so W_e does not matter but for rounding."""
    from sdlora_edge.export.onnx import export_onnx

    from sdlora_edge.train.run import Run

    export_onnx(Run.open(fleet.run), tmp_path / "later", 2, [str(fleet.key.with_suffix(".pub"))])
    device = Device.open(store)
    for path in fleet.packets[:2]:
        device.apply(path)
    export_adapter(device, tmp_path / "a.onnx_adapter")
    np.testing.assert_allclose(
        run_plainly(tmp_path / "later", tmp_path / "a.onnx_adapter"), run_plainly(tmp_path / "later", None), atol=1e-4
    )
    assert ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_model_version() == 0


def test_it_is_written_whole_or_not_at_all(store: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "current.onnx_adapter"
    out.write_bytes(b"the one before")

    def power_cut(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(files.os, "replace", power_cut)
        assert cli("device", "export-adapter", "--store", store, "--out", out).code == 130
    assert out.read_bytes() == b"the one before"
    (tmp_path / "file").touch()
    refused = cli("device", "export-adapter", "--store", store, "--out", tmp_path / "file" / "a.onnx_adapter")
    assert (refused.code, "cannot be written" in refused.err) == (3, True)
