"""`device export-weights`: any program gets the device's outputs from the bundle's own model."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.numpy
from conftest import Fleet, Result, pictures

from sdlora_edge.device import Device
from sdlora_edge.device.answers import Asked, Prediction, best
from sdlora_edge.device.engines import Outputs
from sdlora_edge.device.export_weights import export_weights, write_weights
from sdlora_edge.errors import UsageError
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.current import CURRENT, Current
from sdlora_edge.state import TaskState
from sdlora_edge.storage import disk

Cli = Callable[..., Result]
EXPORT = ("device", "export-weights", "--format")


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
        result = cli(*EXPORT, "adapter", "--store", store, "--out", out, "--json")
        assert result.code == 0, result
        device, shown = Device.open(store), json.loads(result.out)
        found = run_plainly(fleet.bundle, out)
        assert found.shape == (3, len(shown["classes"]))
        np.testing.assert_allclose(found, device.logits(pictures(images())), atol=1e-6)
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
    out = tmp_path / "a.onnx_adapter"
    shown = export_weights(device, "adapter", out)
    found, known = run_plainly(tmp_path / "half", out), len(shown.classes)
    np.testing.assert_allclose(found[:, :known], device.logits(pictures(images())), atol=1e-5)
    assert (found[:, known:] < -1e4).all()  # rows without a class can never win
    read = ort.AdapterFormat.read_adapter(str(out))
    assert (read.get_adapter_version(), read.get_model_version()) == (3, 1)
    constants = replace(
        device.bundle, manifest=replace(device.bundle.manifest, weights_as="constants")
    )
    state, weights = device.current()
    with pytest.raises(UsageError, match="--weights-as inputs"):
        write_weights(constants, weights, state, ("adapter", tmp_path / "b.onnx_adapter"))
    assert not (tmp_path / "b.onnx_adapter").exists()
    the_file_takes_the_place_of_the_bundles(device, tmp_path / "placed")


def the_file_takes_the_place_of_the_bundles(device: Device, folder: Path) -> None:
    """With room for a fixed number of classes: no API but that which opens a model."""
    export_weights(device, "safetensors", folder / "weights.safetensors")
    shutil.copy(device.bundle.path / "model.onnx", folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["logits"], {"pictures": images()})
    known = len(device.status().classes)
    np.testing.assert_allclose(found[:, :known], device.logits(pictures(images())), atol=1e-5)


def test_safetensors_hold_what_the_model_takes_as_inputs(
    fleet: Fleet, store: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "served" / "now.safetensors"
    for path in [None, *fleet.packets]:
        if path:
            assert cli("device", "apply", path, "--store", store).code == 0
        shown = json.loads(
            cli(*EXPORT, "safetensors", "--store", store, "--out", out, "--json").out
        )
        device, current = Device.open(store), Current.read(out.parent)
        state, weights = device.current()
        held = safetensors.numpy.load_file(out)
        assert held.keys() == weights.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(held[name], weight)
        assert current == Current.of(shown["lineage"], state, {out.name: shown["sha256"]})
        assert shown["sha256"] == sha256(out.read_bytes())
        session = ort.InferenceSession(str(fleet.bundle / "model.onnx"))
        (found,) = session.run(["logits"], {"pictures": images(), **held})
        np.testing.assert_allclose(found, device.logits(pictures(images())), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("ptd", "a.ptd", "--target executorch"),
        ("onnx", "a.onnx", "choose safetensors, adapter, ptd"),
        ("safetensors", "current.json", "choose another name"),
    ],
)
def test_what_a_bundle_does_not_take_is_refused_by_name(
    store: Path, cli: Cli, tmp_path: Path, kind: str, name: str, said: str
) -> None:
    refused = cli(*EXPORT, kind, "--store", store, "--out", tmp_path / "new" / name)
    assert (refused.code, said in refused.err) == (2, True), refused
    assert not (tmp_path / "new").exists()


def test_it_is_written_whole_or_not_at_all(
    store: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "current.onnx_adapter"
    out.write_bytes(b"the one before")

    def power_cut(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(disk.os, "replace", power_cut)
        assert cli(*EXPORT, "adapter", "--store", store, "--out", out).code == 130
    assert out.read_bytes() == b"the one before"
    (tmp_path / "file").touch()
    refused = cli(
        *EXPORT, "adapter", "--store", store, "--out", tmp_path / "file" / "a.onnx_adapter"
    )
    assert (refused.code, "cannot be written" in refused.err) == (3, True)


def documented() -> Callable[[np.ndarray, np.ndarray], tuple[str, float, bool]]:
    """`answer` as docs/guides/other-runtimes.md has it. It reads served/current.json."""
    guide = Path(__file__).resolve().parents[2] / "docs" / "guides" / "other-runtimes.md"
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", guide.read_text(), re.S) if "told" in b
    )
    names: dict[str, Any] = {}
    exec(compile(block, str(guide), "exec"), names)  # noqa: S102
    answer: Callable[[np.ndarray, np.ndarray], tuple[str, float, bool]] = names["answer"]
    return answer


def without_numpy(
    current: Mapping[str, Any], logits: list[float], features: list[float]
) -> tuple[float, float]:
    """(score, probability of the best class) by docs/packet.md, as any language has it."""
    told = current["confidence"]
    live = [x for x, name in zip(logits, current["classes"], strict=False) if name is not None]
    score = max(live)
    for q, scale, bias in zip(told["weight"], told["scale"], told["bias"], strict=True):
        score -= (scale * sum(a * b for a, b in zip(q, live, strict=True)) + bias) ** 2
    for mean, precision, feature in zip(told["mean"], told["precision"], features, strict=False):
        score -= (precision * (feature - mean)) ** 2
    return score, 1 / sum(math.exp((x - max(live)) / told["temperature"]) for x in live)


@pytest.mark.parametrize("threshold", [None, -3.25])
def test_current_json_is_all_that_another_program_needs_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None
) -> None:
    """Retired rows and rows without a class hold anything, and take no part."""
    random = np.random.default_rng(3)
    own = Confidence(
        np.array([1.7], np.float32),
        random.integers(-127, 128, (3, 4)).astype(np.int8),
        np.array([1e-5, 0.003, 0.02], np.float32),
        random.standard_normal(3).astype(np.float32),
        *(np.abs(random.standard_normal((2, 5))) / 3).astype(np.float16),
        np.array([] if threshold is None else [threshold], np.float32),
    )
    for confidence in (own, Confidence.none(4)):
        none = np.zeros(0, np.float32)
        classes = ("a", None, "b", "c", None, "d")
        state = TaskState(1, "t", "1" * 64, classes, none, none, none, {}, confidence=confidence)
        served = tmp_path / "served"
        served.mkdir(exist_ok=True)
        Current.of("0" * 64, state, {"a.ptd": "2" * 64}).write(served)
        assert Current.read(served) == Current.of("0" * 64, state, {"a.ptd": "2" * 64})
        monkeypatch.chdir(tmp_path)
        current, answer = json.loads((served / CURRENT).read_text()), documented()
        assert current["confidence"]["temperature"] == float(confidence.temperature[0])
        seen = set()
        for logits in random.normal(0, 2, (50, 8)).astype(np.float32):
            logits[[1, 4, 6, 7]] = np.nan, -np.inf, np.inf, -1e30
            features = random.normal(0, 2, 5).astype(np.float32)
            (ours,) = best(Outputs(logits[None, :6], features[None]), state, 1, Asked())
            assert isinstance(ours, Prediction)
            assert answer(logits, features) == (
                ours.label,
                pytest.approx(ours.confidence),
                ours.known,
            )
            score, probability = without_numpy(current, logits.tolist(), features.tolist())
            assert (score, probability) == pytest.approx((ours.score, ours.confidence))
            seen.add(ours.known)
        assert seen == ({True, False} if confidence.tells_unknown else {True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", None),
        ("weight", [[1.5]]),
        ("weight", [[128]]),
        ("scale", [None]),
        ("threshold", [1.0]),
        ("more", 1.0),
    ],
)
def test_a_current_whose_confidence_is_malformed_is_none(
    tmp_path: Path, field: str, value: object
) -> None:
    """It is written again, as one that is missing."""
    none = np.zeros(0, np.float32)
    state = TaskState(1, "t", "1" * 64, ("a",), none, none, none, {}, confidence=Confidence.none(1))
    good = Current.of("0" * 64, state, {"a.ptd": "2" * 64})
    good.write(tmp_path)
    assert Current.read(tmp_path) == good
    replace(good, confidence={**good.confidence, field: value}).write(tmp_path)
    assert Current.read(tmp_path) is None
