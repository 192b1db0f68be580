"""An exported model says what it is to whoever opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import onnxruntime as ort
from conftest import Fleet
from sdlora_edge.export.metadata import metadata

from sdlora_edge.formats.bundle import open_bundle


def test_it_says_which_state_which_classes_and_how_images_are_prepared(
    fleet: Fleet, tmp_path: Path
) -> None:
    manifest = json.loads((fleet.bundle / "manifest.json").read_bytes())
    state = open_bundle(fleet.bundle).state
    found = metadata(manifest, state)
    assert all(isinstance(value, str) for value in found.values())
    for name in ("model", "task_name"):
        assert found[f"sdlora_edge.{name}"] == manifest[name]
    assert found["sdlora_edge.lineage"] == manifest["states"][0]
    assert found["sdlora_edge.state"] == manifest["states"][-1]
    assert json.loads(found["sdlora_edge.preprocessing"]) == manifest["preprocessing"]
    assert json.loads(found["sdlora_edge.task"]) == len(manifest["states"]) - 1
    assert json.loads(found["sdlora_edge.classes"]) == list(state.classes)
    assert "files" not in str(found)  # a model cannot hold its own digest
    shutil.copytree(fleet.bundle, tmp_path / "bundle")
    path = str(tmp_path / "bundle" / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, found)
    onnx.save(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    assert ort.InferenceSession(path, options).get_modelmeta().custom_metadata_map == found
