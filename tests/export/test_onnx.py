"""The exported file: an ordinary ONNX model whose adapted weights can be replaced; and export's proof is a real one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Fleet, pictures, shared
from sdlora_edge.export import onnx as exporting
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.parity import compare, host_logits
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.demo import ship
from sdlora_edge.device import Device
from sdlora_edge.errors import HealthError
from sdlora_edge.formats.bundle import open_bundle
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run


def plain_session(bundle: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(bundle / "model.onnx"), options)


def test_it_runs_as_it_is_in_plain_onnx_runtime_with_any_batch(fleet: Fleet) -> None:
    session, run = plain_session(fleet.bundle), Run.open(fleet.run)
    assert [i.name for i in session.get_inputs()] == ["pictures"]
    for batch in (1, 2, 5):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)
        (found,) = session.run(["logits"], pictures(images))
        np.testing.assert_allclose(found, host_logits(run, 0, pictures(images)), atol=1e-4)


def test_adapted_weights_and_head_are_overridable_and_bear_the_backbones_names(
    fleet: Fleet,
) -> None:
    model = onnx.load(str(fleet.bundle / "model.onnx"), load_external_data=False)
    inputs = {i.name for i in model.graph.input} - {"pictures"}
    assert inputs == {f"blocks.{i}.attn.qkv.weight" for i in range(4)} | {
        "head.weight",
        "head.bias",
    }
    assert inputs <= {i.name for i in model.graph.initializer}
    session = plain_session(fleet.bundle)
    feed = {"pictures": np.zeros((1, 3, 16, 16), np.float32)}
    weight, bias = np.zeros((77, 64), np.float32), np.arange(77, dtype=np.float32)
    found, _ = session.run(None, {**feed, "head.weight": weight, "head.bias": bias})
    np.testing.assert_array_equal(found[0], bias)  # more classes than it was exported with


def test_weights_are_stored_once(fleet: Fleet) -> None:
    bundle = open_bundle(fleet.bundle)
    adapted = sum(w.nbytes for w in bundle.weights.values())
    backbone = sum(p.numel() * 4 for p in Run.open(fleet.run).backbone.parameters())
    files = bundle.manifest.files
    assert files["weights.safetensors"]["size"] > adapted
    assert bundle.model_bytes < backbone + 60_000  # the graph itself


def test_a_bundle_says_nothing_about_the_machine_it_was_made_on(fleet: Fleet) -> None:
    for path in fleet.bundle.iterdir():
        data = path.read_bytes()
        assert str(Path.home()).encode() not in data
        assert not re.search(rb"[\w/]{4,}\.py\b", data), path  # weights may hold any three bytes


def test_export_fails_where_the_engine_computes_something_else(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = exporting._save

    def spoiled(model: onnx.ModelProto, folder: Path) -> None:
        gelu = next(n for n in model.graph.node if n.op_type == "Gelu")
        gelu.op_type = "Relu"
        gelu.ClearField("attribute")
        save(model, folder)

    with monkeypatch.context() as spoil:
        spoil.setattr(exporting, "_save", spoiled)
        with pytest.raises(HealthError, match="does not compute what torch computes"):
            export_bundle(Run.open(fleet.run), tmp_path / "bundle", 0)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(HealthError, match="logits differ by"):
        export_bundle(
            Run.open(fleet.run), tmp_path / "bundle", 0, options=ExportOptions(tolerance=1e-12)
        )
    assert not (tmp_path / "bundle").exists()


def test_parity_sees_every_kind_of_difference() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 1.0]], np.float32)
    assert compare(logits, logits).require(1e-9, 1.0, 50.0, "x").images == 2
    for other in (logits + 1e-3, logits[:, ::-1], logits * np.nan, logits[:, :1]):
        with pytest.raises(HealthError):
            compare(other, logits).require(1e-4, 1.0, 50.0, "x")


@pytest.mark.long
def test_the_whole_loop_on_real_characters(tmp_path: Path) -> None:
    """ViT-Tiny's real weights and 12 Omniglot classes: three packets, host and device alike on every test image."""
    import zipfile

    with zipfile.ZipFile(shared("omniglot_small1.zip")) as archive:
        names = [
            n
            for n in archive.namelist()
            if "/Latin/" in n and any(f"character{c:02d}/" in n for c in range(1, 9))
        ]
        archive.extractall(tmp_path / "data", names)
    settings = {
        "data": str(tmp_path / "data"), "weights": str(shared("vit_tiny_patch16_224.fp16.safetensors")), "image_size": 64,
        "tasks": 4, "epochs": 2, "test_fraction": 0.3, "seed": 0,
    }  # fmt: skip
    run = train(resolve(None, settings), tmp_path / "run")
    shipped = ship(run, tmp_path, 1)
    assert [row.task for row in shipped.tasks] == [1, 2, 3, 4]
    for row in shipped.tasks:
        assert row.host_accuracy == row.device_accuracy
        assert row.same_top == row.images == 12 * row.task
        assert row.max_logit_difference <= 1e-4
        assert row.packet_bytes < 210_000
    assert shipped.model_bytes > 21_000_000
    assert Device.open(tmp_path / "store").status().classes == run.states[-1].names
