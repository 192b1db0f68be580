"""Exported models compute what the head sees, in every form: ONNX, ExecuTorch, and beside a PEFT adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from conftest import pictures, square
from networks import every_kind
from sdlora_edge.export.form import ModelForm
from sdlora_edge.export.onnx import write_model
from sdlora_edge.export.peft import HEAD, AdaptedModel, write_adapter
from torch import nn

from sdlora_edge.formats.bundle import CONSTANTS, HEAD_BIAS, HEAD_WEIGHT, INPUTS
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.encoding import Factors
from sdlora_edge.method import backbones, features
from sdlora_edge.method.feature_spec import FeatureSpec
from sdlora_edge.method.features import Extractor
from sdlora_edge.method.merged import Merged, adapted_weights, logits_of
from sdlora_edge.state import TaskState, merge

KINDS = every_kind()


def some(backbone: nn.Module, spec: FeatureSpec, images: np.ndarray) -> tuple[Any, Any, Any]:
    """(weights and head, what the head sees of images, their logits)"""
    random = np.random.default_rng(0)
    weights = adapted_weights(backbone, backbones.projections(backbone))
    for weight in weights.values():
        weight += 0.02 * random.standard_normal(weight.shape).astype(np.float32)
    seen = Merged(backbone, weights, exact=True, spec=spec).features(images)
    head = random.standard_normal((5, features.width(backbone, spec))).astype(np.float32)
    head /= np.float32(np.abs(seen).max() * len(head[0]) ** 0.5)
    bias = random.standard_normal(5).astype(np.float32)
    return {**weights, HEAD_WEIGHT: head, HEAD_BIAS: bias}, seen, seen @ head.T + bias


def some_images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "text", "precision", "bound"),
    [
        ("vit", "cls+mean:2", "int8", 0.05),
        ("resnet", "mean:2", "fp32", 1e-4),
    ],
)
def test_onnx_computes_the_same_features_and_logits(
    kind: str, text: str, precision: str, bound: float, tmp_path: Path
) -> None:
    backbone, spec, images = KINDS[kind](), FeatureSpec.parse(text), some_images()
    weights, seen, expected = some(backbone, spec, images)
    form = ModelForm(square(32), precision, INPUTS, 0, spec)
    write_model(backbone, weights, tmp_path, form, {})
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options)
    assert [output.name for output in session.get_outputs()] == ["logits", "features"]
    logits, found = session.run(None, pictures(images))
    assert np.abs(logits - expected).max() <= bound
    assert np.abs(found - seen).max() <= bound * np.abs(seen).max()


def test_executorch_computes_the_same_features_and_logits(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install executorch")
    from sdlora_edge.export.executorch import write_program

    from sdlora_edge.device.engines.executorch_runtime import ExecutorchEngine

    backbone, spec, images = KINDS["vit"](), FeatureSpec.parse("cls+mean:2"), some_images()
    backbone.blocks = backbone.blocks[:2]  # type: ignore[index] # lowered in less time
    weights, seen, expected = some(backbone, spec, images)
    form = ModelForm(square(32), "fp32", CONSTANTS, 12, spec)
    places = write_program(backbone, weights, tmp_path, form)
    files = {"model.pte": {"sha256": sha256((tmp_path / "model.pte").read_bytes())}}
    manifest = SimpleNamespace(weights=places, capacity=12, files=files, lineage="00" * 32)
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=manifest)
    engine = ExecutorchEngine(bundle, 0, tmp_path / "work")
    logits, found = engine.outputs(engine.load(weights), pictures(images))
    assert found is not None
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(found, seen, atol=1e-4 * np.abs(seen).max())


def test_peft_finds_the_wide_head_beside_the_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
    backbone, _ = backbones.create("micro_vit", 16, None, pretrained=False)
    spec, random = FeatureSpec.parse("mean:3"), np.random.default_rng(0)
    projections = backbones.projections(backbone)
    factors = {
        p.name: Factors(
            *(0.2 * random.standard_normal(s).astype(np.float32) for s in ((2, 64), (64, 2)))
        )
        for p in projections
    }
    head = random.standard_normal((3, features.width(backbone, spec))).astype(np.float32)
    names, bias = tuple("abc"), np.arange(3, dtype=np.float32)
    known = Confidence.none(3)
    state = TaskState(1, "t", "00" * 32, names, np.ones(1), head, bias, {}, known)
    model = AdaptedModel("micro_vit", 16, projections, str(spec))
    written = write_adapter(model, state, [factors], tmp_path / "adapter")
    assert written.head == HEAD
    assert HEAD in caplog.text
    images = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)
    merged = merge(adapted_weights(backbone, projections), projections, [factors], np.ones(1))
    expected = logits_of(state, Merged(backbone, merged, exact=True, spec=spec).features(images))
    told = json.loads((tmp_path / "adapter" / "sdlora_edge.json").read_text())
    stored = safetensors.torch.load_file(tmp_path / "adapter" / HEAD)
    adapted = PeftModel.from_pretrained(backbone, str(tmp_path / "adapter")).merge_and_unload()
    with torch.no_grad():
        seen = Extractor(adapted.eval(), FeatureSpec.parse(told["features"]))(torch.tensor(images))
        found = seen @ stored["head.weight"].T + stored["head.bias"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
    alone = write_adapter(model, state, [factors], tmp_path / "alone", alone=True)
    assert alone.head is None
    assert not (tmp_path / "alone" / HEAD).exists()
