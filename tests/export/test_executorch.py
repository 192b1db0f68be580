"""A bundle's program for ExecuTorch: equal to torch, updated by patching bytes, never without a whole pair on disk."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures, shared, square
from sdlora_edge.export import executorch as exporting
from sdlora_edge.export.executorch import write_program
from sdlora_edge.export.form import ModelForm
from timm.models.efficientnet import EfficientNet
from torch import nn
from torch.func import functional_call

from sdlora_edge.device.engines.executorch_runtime import ExecutorchEngine, patched
from sdlora_edge.errors import InputError, ResourceError, StorageError, UsageError
from sdlora_edge.formats.bundle import CONSTANTS, HEAD_BIAS, HEAD_WEIGHT
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.current import CURRENT, Current
from sdlora_edge.method import backbones
from sdlora_edge.method.backbones import shaped
from sdlora_edge.state import TaskState
from sdlora_edge.storage import atomic, disk

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install executorch")

CAPACITY = 12


def form(size: int, precision: str = "fp32") -> ModelForm:
    return ModelForm(square(size), precision, CONSTANTS, CAPACITY)


def some_weights(backbone: nn.Module, classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Adapted weights near the backbone's own, and a head."""
    random = np.random.default_rng(seed)
    weights = {}
    for p in backbones.projections(backbone):
        own = backbone.get_parameter(p.tensor).detach().numpy()
        own = own.reshape(len(own), -1)
        weights[p.tensor] = (own + 0.02 * random.standard_normal(own.shape)).astype(np.float32)
    weights[HEAD_WEIGHT] = 0.1 * random.standard_normal(
        (classes, backbones.features(backbone))
    ).astype(np.float32)
    weights[HEAD_BIAS] = random.standard_normal(classes).astype(np.float32)
    return weights


@torch.no_grad()
def by_torch(
    backbone: nn.Module, weights: Mapping[str, np.ndarray], images: np.ndarray
) -> np.ndarray:
    adapted = {
        n: torch.from_numpy(w) for n, w in weights.items() if n not in (HEAD_WEIGHT, HEAD_BIAS)
    }
    features = functional_call(backbone, shaped(backbone, adapted), (torch.from_numpy(images),))
    return features.numpy() @ weights[HEAD_WEIGHT].T + weights[HEAD_BIAS]


def some_images(size: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, size, size)).astype(np.float32)


def pair(folder: Path, places: Mapping[str, Any], capacity: int = CAPACITY) -> Any:
    """What the engine reads of an opened bundle."""
    files = {"model.pte": {"sha256": sha256((folder / "model.pte").read_bytes())}}
    manifest = SimpleNamespace(weights=places, capacity=capacity, files=files, lineage="00" * 32)
    return SimpleNamespace(path=folder, manifest=manifest)


def state(task: int = 0) -> TaskState:
    none = np.zeros(0, np.float32)
    return TaskState(task, "t", f"{task:064x}", ("a",), none, none, none, {}, Confidence.none(1))


def in_force(work: Path) -> dict[str, bytes]:
    """What a C++ program loads: the files that current.json names, each the one it says."""
    current = Current.read(work)
    assert current is not None
    files = {name: (work / name).read_bytes() for name in current.files}
    assert {name: sha256(data) for name, data in files.items()} == current.files
    return files


def small_convolutions() -> nn.Module:
    """EfficientNet's blocks, small: pointwise convolutions with batch norm behind them, whose numbers are no identity."""
    torch.manual_seed(0)
    blocks = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e3_c12"], ["ir_r1_k3_s2_e3_c16_se0.25"]]
    from timm.models._efficientnet_builder import decode_arch_def

    model = EfficientNet(
        decode_arch_def(blocks), num_classes=0, num_features=24, stem_size=8
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any, dict[str, np.ndarray]]:
    """(backbone, the exported pair, the weights it was exported with)"""
    torch.manual_seed(0)
    backbone, _ = backbones.create("micro_vit", 16, None, False)
    backbone.blocks = backbone.blocks[:2]  # type: ignore[index] # lowered in half the time
    folder = tmp_path_factory.mktemp("micro")
    weights = some_weights(backbone, 5)
    return (
        backbone,
        pair(folder, write_program(backbone, weights, folder, form(16))),
        weights,
    )


def test_a_vit_computes_what_torch_computes_update_after_update(micro: Any, tmp_path: Path) -> None:
    backbone, bundle, first = micro
    engine, images = ExecutorchEngine(bundle, 0, tmp_path), some_images(16)
    loaded = engine.load(first)
    reference = by_torch(backbone, first, images)
    np.testing.assert_allclose(engine.run(loaded, pictures(images)), reference, atol=1e-4)
    for update in range(1, 6):
        weights = some_weights(backbone, 5 + update, update)
        newer = engine.load(weights)
        found = engine.run(newer, pictures(images))
        assert found.shape == (3, 5 + update)
        np.testing.assert_allclose(found, by_torch(backbone, weights, images), atol=1e-4)
        np.testing.assert_allclose(
            engine.run(loaded, pictures(images)), reference, atol=1e-4
        )  # the first one still answers
        engine.publish(newer, state(update))


def test_the_features_are_another_output_of_each_image(micro: Any, tmp_path: Path) -> None:
    backbone, bundle, weights = micro
    engine, images = ExecutorchEngine(bundle, 0, tmp_path), some_images(16)
    logits, features = engine.outputs(engine.load(weights), pictures(images))
    assert features is not None
    assert (logits.dtype, features.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(logits, by_torch(backbone, weights, images), atol=1e-4)
    again = features @ weights[HEAD_WEIGHT].T + weights[HEAD_BIAS]
    np.testing.assert_allclose(logits, again, atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 1e-3, "each image has its own"


def test_convolutions_with_batch_norm_behind_them_stay_replaceable(tmp_path: Path) -> None:
    backbone, images = small_convolutions(), some_images(32)
    weights = some_weights(backbone, 4)
    assert len(weights) > 6
    bundle = pair(tmp_path, write_program(backbone, weights, tmp_path, form(32)))
    engine = ExecutorchEngine(bundle, 0, tmp_path / "work")
    for other in (weights, some_weights(backbone, 7, 1)):
        np.testing.assert_allclose(
            engine.run(engine.load(other), pictures(images)),
            by_torch(backbone, other, images),
            atol=1e-4,
        )


def test_batch_norm_after_a_linear_layer_stays_apart_too(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        num_features = 6

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 6), nn.BatchNorm1d(6)
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.fc(x.mean((2, 3))))

    backbone, random = Net().eval(), np.random.default_rng(0)
    shapes = {"fc.weight": (6, 3), HEAD_WEIGHT: (2, 6), HEAD_BIAS: (2,)}
    weights = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    engine = ExecutorchEngine(
        pair(tmp_path, write_program(backbone, weights, tmp_path, form(8))),
        0,
        tmp_path / "w",
    )
    images = some_images(8)
    np.testing.assert_allclose(
        engine.run(engine.load(weights), pictures(images)),
        by_torch(backbone, weights, images),
        atol=1e-4,
    )


def test_program_and_places_do_not_depend_on_the_values_of_the_weights(
    micro: Any, tmp_path: Path
) -> None:
    """Not even where weights are equal: ExecuTorch stores equal constants once, and replacing one would replace them all."""
    backbone, bundle, weights = micro
    zeros = {name: np.zeros_like(array) for name, array in weights.items()}
    assert write_program(backbone, zeros, tmp_path, form(16)) == bundle.manifest.weights
    assert (tmp_path / "model.pte").read_bytes() == (bundle.path / "model.pte").read_bytes()
    assert len({place["offset"] for place in bundle.manifest.weights.values()}) == len(weights)


@pytest.mark.long
def test_the_real_vit_computes_what_torch_computes_at_every_precision(tmp_path: Path) -> None:
    weights_file = shared("vit_tiny_patch16_224.fp16.safetensors")
    backbone, _ = backbones.create("vit_tiny_patch16_224", 64, weights_file, False)
    backbone.blocks = backbone.blocks[:3]  # type: ignore[index] # twelve take four times as long to lower
    weights, images = some_weights(backbone, 5), some_images(64)
    reference = by_torch(backbone, weights, images)
    sizes = {}
    for precision, bound in {"fp32": 1e-4, "int8": 0.1, "int8-dynamic": 0.2}.items():
        folder = tmp_path / precision
        folder.mkdir()
        places = write_program(backbone, weights, folder, form(64, precision))
        engine = ExecutorchEngine(pair(folder, places), 0, folder / "work")
        found = engine.run(engine.load(weights), pictures(images))
        assert np.abs(found - reference).max() <= bound, precision
        sizes[precision] = sum(f.stat().st_size for f in folder.glob("model.*"))
    assert max(sizes["int8"], sizes["int8-dynamic"]) < sizes["fp32"] / 1.4


def test_what_executorch_cannot_do_is_refused_by_what_it_can(micro: Any, tmp_path: Path) -> None:
    backbone, _, weights = micro
    with pytest.raises(UsageError, match=r"fp16.*choose fp32, int8, int8-dynamic"):
        write_program(backbone, weights, tmp_path, form(16, "fp16"))
    with pytest.raises(UsageError, match="no linear layer"):
        write_program(
            nn.Flatten(),
            {n: weights[n] for n in (HEAD_WEIGHT, HEAD_BIAS)},
            tmp_path,
            form(16, "int8"),
        )
    assert not list(tmp_path.iterdir())


def test_rows_that_no_class_has_can_never_win(micro: Any) -> None:
    """In any program that loads the pair: here in executorch's own runtime, which sees every row."""
    from executorch.runtime import Runtime

    _, bundle, _ = micro
    method = (
        Runtime.get()
        .load_program(bundle.path / "model.pte", data_path=bundle.path / "model.ptd")
        .load_method("forward")
    )
    for image in torch.from_numpy(1e3 * some_images(16)):
        logits, _ = method.execute([image[None]])
        assert logits.shape == (1, CAPACITY)
        assert torch.isfinite(logits).all()
        assert logits[0, 5:].max() < logits[0, :5].min()


def test_patching_needs_numpy_alone(micro: Any, tmp_path: Path) -> None:
    _, bundle, weights = micro
    changed = {"blocks.1.attn.qkv.weight": weights["blocks.1.attn.qkv.weight"] + 1}
    np.savez(tmp_path / "changed.npz", **changed)
    program = f"""
import sys
for name in ("torch", "executorch", "torchao", "timm", "onnx", "onnxruntime"):
    sys.modules[name] = None
import numpy as np
from sdlora_edge.device.engines.executorch_runtime import ExecutorchEngine, patched
from sdlora_edge.errors import InputError
data, changed = open({str(bundle.path / "model.ptd")!r}, "rb"), dict(np.load(sys.argv[1] + "/changed.npz"))
open(sys.argv[1] + "/patched", "wb").writelines(patched(data, {bundle.manifest.weights!r}, changed))
try:
    ExecutorchEngine(None, 0, None)
except InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "run pip install 'sdlora-edge[executorch]'" in done.stdout
    old, new = (bundle.path / "model.ptd").read_bytes(), (tmp_path / "patched").read_bytes()
    place = bundle.manifest.weights["blocks.1.attn.qkv.weight"]
    start, stop = place["offset"], place["offset"] + 4 * int(np.prod(place["shape"]))
    assert new[start:stop] == changed["blocks.1.attn.qkv.weight"].tobytes()
    assert (new[:start], new[stop:]) == (old[:start], old[stop:])


def test_a_patch_that_does_not_fit_is_refused() -> None:
    places = {"w": {"file": "model.ptd", "offset": 8, "dtype": "float32", "shape": [2, 2]}}
    ones = {"w": np.ones((2, 2), np.float32)}
    assert b"".join(patched(io.BytesIO(bytes(24)), places, ones)) == bytes(8) + ones["w"].tobytes()
    for data, weights in (
        (24, {"v": np.ones((2, 2))}),
        (24, {"w": np.ones((2, 3))}),
        (20, {"w": np.ones((2, 2))}),
    ):
        with pytest.raises(InputError, match=r"no place for v|w \(2, "):
            list(
                patched(
                    io.BytesIO(bytes(data)),
                    places,
                    {n: w.astype(np.float32) for n, w in weights.items()},
                )
            )


def power_cut(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_publishing_moves_from_one_whole_pair_to_the_next(
    micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at each step of an update, other programs find the old pair or the new one."""
    backbone, bundle, first = micro
    engine = ExecutorchEngine(bundle, 0, tmp_path)
    old = engine.load(first)
    engine.publish(old, state())
    published = in_force(tmp_path)
    assert sorted(path.suffix for path in map(Path, published)) == [".ptd", ".pte"]
    assert published["model.pte"] == (bundle.path / "model.pte").read_bytes()

    second = some_weights(backbone, 6, 1)
    for operation in ("fsync", "replace"):
        with monkeypatch.context() as cut:
            cut.setattr(disk.os, operation, power_cut)
            with pytest.raises(ResourceError):
                engine.load(second)
        assert in_force(tmp_path) == published
        assert len(list(tmp_path.iterdir())) == 3
    new = engine.load(second)
    with monkeypatch.context() as cut:
        cut.setattr(disk.os, "replace", power_cut)
        with pytest.raises(ResourceError):
            engine.publish(new, state(1))
    assert in_force(tmp_path) == published
    engine.publish(new, state(1))
    engine.publish(new, state(1))
    files = in_force(tmp_path)
    assert files.keys() | {CURRENT} == {p.name for p in tmp_path.iterdir()}
    (tmp_path / "flashed").mkdir()
    for name, data in files.items():
        (tmp_path / "flashed" / f"model{Path(name).suffix}").write_bytes(data)
    again = ExecutorchEngine(
        pair(tmp_path / "flashed", bundle.manifest.weights), 0, tmp_path / "other"
    )
    loaded = again.load(second)
    np.testing.assert_array_equal(
        again.run(loaded, pictures(some_images(16))), engine.run(new, pictures(some_images(16)))
    )
    assert loaded.weights.path.read_bytes() in files.values()


def test_reopening_writes_nothing_and_what_is_dropped_leaves_nothing(
    micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle, weights = micro
    engine = ExecutorchEngine(bundle, 0, tmp_path)
    engine.publish(engine.load(weights), state())
    (data,) = tmp_path.glob("*.ptd")
    before = data.stat()
    with monkeypatch.context() as unwritable:
        unwritable.setattr(atomic, "write", None)
        reopened = ExecutorchEngine(bundle, 0, tmp_path)
        loaded = reopened.load(weights)
        assert reopened.published(loaded, state())
        assert not reopened.published(loaded, state(1)), "the same weights, but another state"
        reopened.publish(loaded, state())
    assert data.stat().st_ino == before.st_ino
    del loaded
    dropped = engine.load({**weights, HEAD_BIAS: weights[HEAD_BIAS] + 1})
    assert len(list(tmp_path.iterdir())) == 4
    del dropped
    gc.collect()
    assert {p.name for p in tmp_path.iterdir()} == {CURRENT, "model.pte", data.name}


def test_whoever_may_only_read_loads_from_elsewhere(
    micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle, weights = micro
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    engine, work = ExecutorchEngine(bundle, 0, tmp_path / "work"), tmp_path / "work"
    published = engine.load(weights)
    engine.publish(published, state())
    before = {p.name: p.read_bytes() for p in work.iterdir()}
    other = {**weights, HEAD_BIAS: weights[HEAD_BIAS] + 1}
    with monkeypatch.context() as reader:
        reader.setattr(os, "access", lambda *_, **__: False)
        reader.setattr(os, "link", power_cut)
        loaded = [engine.load(weights), engine.load(other)]
        with pytest.raises(StorageError, match="cannot be written"):
            engine.require_publishing()
    assert [engine.published(one, state()) for one in loaded] == [True, False]
    assert {one.weights.path.parent for one in loaded} == {tmp_path / "temporary"}
    assert {p.name: p.read_bytes() for p in work.iterdir()} == before
    for one, bias in zip(loaded, (0, 1), strict=True):
        found = engine.run(one, pictures(some_images(16)))
        np.testing.assert_allclose(
            found, engine.run(published, pictures(some_images(16))) + bias, atol=1e-4
        )
    loaded.clear()
    del one
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_threads_share_one_engine(micro: Any, tmp_path: Path) -> None:
    backbone, bundle, weights = micro
    engine, images = ExecutorchEngine(bundle, 1, tmp_path), some_images(16, 8)
    loaded, reference, wrong = engine.load(weights), by_torch(backbone, weights, images), []

    def ask() -> None:
        for _ in range(20):
            if not np.allclose(engine.run(loaded, pictures(images)), reference, atol=1e-4):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pair_that_is_not_one_is_an_input_error(micro: Any, tmp_path: Path) -> None:
    _, bundle, weights = micro
    (tmp_path / "model.pte").write_bytes(b"no program" * 100)
    (tmp_path / "model.ptd").write_bytes((bundle.path / "model.ptd").read_bytes())
    engine = ExecutorchEngine(pair(tmp_path, bundle.manifest.weights), 0, tmp_path / "work")
    with pytest.raises(InputError, match="ExecuTorch cannot load it"):
        engine.load(weights)
    assert not list((tmp_path / "work").iterdir())


def test_a_weight_that_a_compiler_would_change_is_not_exported(
    micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_keep_apart", lambda *_: None)
    backbone = small_convolutions()
    with pytest.raises(InputError, match="does not lie as raw bytes in"):
        write_program(backbone, some_weights(backbone, 4), tmp_path, form(32))
