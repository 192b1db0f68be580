"""A device applies, predicts, rolls back, and is never left without a working model."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import Fleet, images, inputs, snapshot, with_file
from faults.scenarios import wrong_canary
from PIL import Image
from sdlora_edge.export.parity import host_logits

from sdlora_edge.device import Device, Prediction
from sdlora_edge.device.device import DOUBLE_BUFFER, IN_PLACE
from sdlora_edge.device.records import CONFIRMED, FAILED, PENDING, Generation
from sdlora_edge.device.store import Store
from sdlora_edge.errors import HealthError, InputError, NothingToDo, UsageError
from sdlora_edge.formats.bundle import (
    CANARY_LOGITS,
    CLASSES,
    CLASSES_FORMAT,
    FACTORS,
    MANIFEST,
    open_bundle,
)
from sdlora_edge.formats.canonical import dump_json, sha256
from sdlora_edge.storage import atomic
from sdlora_edge.train.run import Run


def test_after_every_packet_the_device_computes_what_the_host_does(
    fleet: Fleet, store: Path
) -> None:
    run, device = Run.open(fleet.run), Device.open(store)
    for task, path in enumerate([None, *fleet.packets]):
        if path:
            status = device.apply(path)
            assert status.task == task
            assert status.canary_difference <= 1e-4
        reference = host_logits(run, task, inputs(device))
        np.testing.assert_allclose(device.logits(inputs(device)), reference, atol=1e-4)
        answers = device.predict(images(), top=2)
        assert [a.top[0][0] for a in answers] == [
            run.states[task].classes[i] for i in reference.argmax(axis=1)
        ]
        assert all(a.top[0][1] >= a.top[1][1] for a in answers)


def test_images_are_decoded_batch_by_batch(store: Path) -> None:
    """However many there are; and one that cannot be read is an error in its place."""
    device, taken = Device.open(store, threads=1), 0

    def images() -> Iterator[np.ndarray]:
        nonlocal taken
        for taken in range(1, 1000):
            yield np.zeros((0, 0, 3) if taken == 2 else (8, 8, 3), np.uint8)

    answers = device.predict_each(images(), batch_size=4)
    seen = [next(answers) for _ in range(5)]
    assert taken == 8
    assert [isinstance(one, InputError) for one in seen] == [False, True, False, False, False]
    with pytest.raises(InputError):
        device.predict(images())
    assert device.predict([]) == []


def test_a_rollback_is_exact_and_a_store_opens_as_it_was_left(fleet: Fleet, store: Path) -> None:
    device = Device.open(store)
    seen = [device.logits(inputs(device))]
    for path in fleet.packets:
        device.apply(path)
        seen.append(device.logits(inputs(device)))
    np.testing.assert_array_equal(Device.open(store).logits(inputs(device)), seen[-1])
    for task in (2, 1, 0):
        assert device.rollback().task == task
        np.testing.assert_array_equal(device.logits(inputs(device)), seen[task])
        np.testing.assert_array_equal(Device.open(store).logits(inputs(device)), seen[task])
    with pytest.raises(NothingToDo):
        device.rollback()


def test_a_bundle_of_any_task_takes_the_same_packets(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    from sdlora_edge.export.bundles import export_bundle

    public = str(fleet.key.with_suffix(".pub"))
    export_bundle(Run.open(fleet.run), tmp_path / "bundle1", 1, [public])
    later, first = Device.init(tmp_path / "bundle1", tmp_path / "later"), Device.open(store)
    first.apply(fleet.packets[0])
    with pytest.raises(NothingToDo, match="applied already"):  # the bundle knows it
        later.apply(fleet.packets[0])
    for path in fleet.packets[1:]:
        assert first.apply(path).state == later.apply(path).state
        np.testing.assert_allclose(
            first.logits(inputs(first)), later.logits(inputs(first)), atol=1e-4
        )


def test_a_failing_canary_leaves_the_old_generation_in_force(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    device = Device.open(store)
    before, status = device.logits(inputs(device)), device.status()
    with pytest.raises(HealthError, match="stays in force"):
        device.apply(wrong_canary(fleet, tmp_path))
    for opened in (device, Device.open(store)):
        np.testing.assert_array_equal(opened.logits(inputs(device)), before)
        assert opened.status().state == status.state
        assert opened.status().highest_task == 0
    assert device.apply(fleet.packets[0]).task == 1


def test_a_pending_or_damaged_record_is_never_in_force(fleet: Fleet, store: Path) -> None:
    opened = Store(store)
    old = opened.current()
    for status in (PENDING, FAILED):
        record = Generation(
            9, status, ("ab" * 32,), 9, bundle=old.bundle, before=replace(old, counter=8)
        )
        (store / "generation.0.json").write_bytes(record.to_json())
        assert opened.current() == old
    written = (store / "generation.1.json").read_bytes()
    (store / "generation.1.json").unlink()
    assert opened.current() == replace(
        old, counter=8
    )  # the copy that a record holds which is not confirmed
    (store / "generation.1.json").write_bytes(written)
    record = Generation(9, CONFIRMED, (), 9)
    (store / "generation.0.json").write_bytes(
        record.to_json().replace(b'"counter":9', b'"counter":8')
    )
    assert opened.current() == old
    (store / "generation.1.json").unlink()
    with pytest.raises(InputError, match="no intact generation record"):
        Device.open(store)


@pytest.mark.parametrize("swap", [DOUBLE_BUFFER, IN_PLACE])
def test_predictions_go_on_while_packets_are_applied(fleet: Fleet, store: Path, swap: str) -> None:
    """Each answer is wholly of one generation, and none fails."""
    device = Device.open(store, swap=swap)
    stop, seen, errors = threading.Event(), set(), []

    def serve() -> None:
        while not stop.is_set():
            try:
                answer = device.predict(images(1), top=20)[0]
                seen.add((answer.generation, len(answer.top)))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        for path in fleet.packets:
            device.apply(path, allow_older=True)
        for _ in fleet.packets:
            device.rollback()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    classes = {
        generation: 4 + 2 * min((generation - 1) % 6, 6 - (generation - 1) % 6)
        for generation, _ in seen
    }
    assert all(classes[generation] == count for generation, count in seen)
    assert len(seen) > 3


def test_two_writers_do_not_meet_and_a_second_process_is_followed(
    fleet: Fleet, store: Path
) -> None:
    one, two = Device.open(store), Device.open(store)
    with Store(store).lock(), pytest.raises(UsageError, match="another process"):
        one.apply(fleet.packets[0])
    one.apply(fleet.packets[0])
    assert two.apply(fleet.packets[1]).task == 2


def test_init_refuses_what_exists_and_a_failed_apply_writes_no_packet(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="exists already"):
        Device.init(fleet.bundle, store)
    before = snapshot(store)
    (tmp_path / "bad.sdlora").write_bytes(fleet.packets[0].read_bytes()[:-1])
    with pytest.raises(InputError):
        Device.open(store).apply(tmp_path / "bad.sdlora")
    assert snapshot(store) == before


def test_a_disk_that_does_not_answer_is_no_older_generation(
    fleet: Fleet, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [store / name for name in ("generation.0.json", "generation.1.json")]
    older = [record.read_bytes() for record in records]
    device = Device.open(store)
    device.apply(fleet.packets[0])
    read = atomic.read

    def failing(path: Path, limit: int | None = None) -> bytes:
        if path.name == "generation.0.json":
            raise InputError(f"{path}: Input/output error")
        return read(path, limit)

    with monkeypatch.context() as disk:
        disk.setattr(atomic, "read", failing)
        with pytest.raises(InputError, match="output error"):
            Device.open(store)
    for record, data in zip(records, older, strict=True):
        record.write_bytes(data)
    with pytest.raises(InputError, match="lost its newest"):
        device.apply(fleet.packets[0])
    assert len(device.predict(images())) == 6


def test_packets_no_record_names_are_swept(fleet: Fleet, store: Path, tmp_path: Path) -> None:
    device = Device.open(store)
    with pytest.raises(HealthError):
        device.apply(wrong_canary(fleet, tmp_path))
    (store / "packets" / ".tmp-left").touch()
    for path in fleet.packets:
        device.apply(path)
    assert {p.name for p in (store / "packets").iterdir()} == set(Store(store).current().packets)


def edited(bundle: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(dump_json({**manifest, **changes}))
    return folder


def test_a_device_that_computes_something_else_is_not_flashed(fleet: Fleet, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(fleet.bundle / FACTORS)
    tensors[CANARY_LOGITS] += 1
    wrong = with_file(fleet.bundle, tmp_path / "b", FACTORS, safetensors.numpy.save(tensors))
    with pytest.raises(HealthError):
        Device.init(wrong, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "sdlora-edge/bundle/3"}, {"states": 5}, {"states": ["zz"]}, {"states": []}, {"task": 0},
        {"states": ["0" * 64] * 2}, {"tolerance": 1 << 24}, {"tolerance": 0}, {"tolerance": 0.5}, {"tolerance": True}, {"target": []},
        {"target": "tpu"}, {"files": []}, {"files": {"model.onnx": 5}}, {"files": {}}, {"files": {"../x": {"sha256": "0" * 64, "size": 1}}},
        {"canary": {}}, {"canary": {"seed": 0, "count": 3, "tolerance": 99}}, {"canary": {"seed": 0, "count": 2}}, {"classes": []},
        {"projections": [{}]}, {"projections": [{"name": "x", "tensor": "y", "rows": [0, 1.0], "shape": [1, 1]}]}, {"magnitudes": [1]},
        {"magnitudes": [0.5]}, {"magnitudes": [(10_000 << 24) + 1]}, {"magnitudes": 5}, {"revisions": [0]}, {"made_with": {"torch": 1.5}},
        {"weights": {}}, {"weights_as": "x"}, {"capacity": -1}, {"capacity": 1},
        {"weights": {"head.weight": {"file": "model.onnx", "offset": 1 << 40, "dtype": "float32", "shape": [4, 64]}}},
        {"preprocessing": {"size": 16}}, {"preprocessing": 3}, {"nonsense": 1}, {"capacity": 0.0},
        {"capacity": 5}, {"weights_as": "constants"}, {"min_agreement": (1 << 24) + 1}, {"revision": -1}, {"encoding": "int3"},
    ],
)  # fmt: skip
def test_a_senseless_manifest_is_a_typed_error(
    fleet: Fleet, tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(InputError):
        Device.init(edited(fleet.bundle, tmp_path / "b", **changes), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("canary seed", 1.5),
        ("canary seed", 2**53 + 1),
        ("canary count", 17),
        ("canary tolerance", 5 << 24),
        ("preprocessing mean 0", 0.5),
        ("preprocessing mean 0", 1001 << 24),
        ("preprocessing std 0", 0),
        ("preprocessing size", 1 << 15),
        ("weights head.bias shape", [3]),
        ("weights head.bias offset", -4),
        ("weights head.weight shape", [1 << 40, 64]),
        ("projections 0 shape", [64, 65]),
    ],
)
def test_a_manifest_that_does_not_fit_its_own_files_is_a_typed_error(
    fleet: Fleet, tmp_path: Path, path: str, value: object
) -> None:
    """One field changed, deep in it, and nothing else: what lies in the files is as it was."""
    manifest = json.loads((fleet.bundle / "manifest.json").read_text())
    *keys, last = [int(key) if key.isdigit() else key for key in path.split()]
    place = manifest
    for key in keys:
        place = place[key]
    place[last] = value
    with pytest.raises(InputError):
        Device.init(edited(fleet.bundle, tmp_path / "b", **manifest), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "classes",
    [
        4,
        ["a", "a", "b", "c"],
        ["a/b", "b", "c", "d"],
        ["a", "b", "c"],
        ["a", "b", "c", "d", "e"],
        ["a", "b", "c", 4],
    ],
)
def test_senseless_classes_are_a_typed_error(fleet: Fleet, tmp_path: Path, classes: object) -> None:
    data = dump_json({"format": CLASSES_FORMAT, "classes": classes})
    with pytest.raises(InputError):
        open_bundle(with_file(fleet.bundle, tmp_path / "b", CLASSES, data))


def test_every_number_of_a_manifest_is_an_integer(fleet: Fleet) -> None:
    json.loads((fleet.bundle / MANIFEST).read_text(), parse_float=pytest.fail)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (2, 4, 1)])
def test_canary_logits_have_a_row_for_each_input_and_a_column_for_each_class(
    fleet: Fleet, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors = safetensors.numpy.load_file(fleet.bundle / FACTORS)
    assert tensors[CANARY_LOGITS].shape == (2, 4)
    changed = safetensors.numpy.save({**tensors, CANARY_LOGITS: np.zeros(shape, np.float32)})
    with pytest.raises(InputError, match=r"canary\.logits"):
        open_bundle(with_file(fleet.bundle, tmp_path / "b", FACTORS, changed))


@pytest.mark.parametrize(
    "changes",
    [
        {"counter": "x"},
        {"counter": [9]},
        {"packets": [5]},
        {"packets": "abc"},
        {"highest": "x"},
        {"status": "fine"},
        {"more": 1},
        {"format": "sdlora-edge/store/1"},
        {"counter": 2**53},
        {"trust": [["0" * 64, 1]]},
        {"revoked": [{"sequence": 1.0, "revision": 0}]},
        {"before": 5},
        {"before": {}},
    ],
)
def test_a_senseless_record_is_a_missing_record(store: Path, changes: dict[str, object]) -> None:
    old = Store(store).current()
    body = {
        "format": "sdlora-edge/store/2",
        "counter": 2,
        "status": CONFIRMED,
        "revision": 0,
        "trust": [],
        "revoked": [],
        "packets": [],
        "highest": 0,
        "bundle": old.bundle,
        "before": None,
        **changes,
    }
    (store / "generation.0.json").write_bytes(
        dump_json({**body, "checksum": sha256(dump_json(body))})
    )
    assert Store(store).current() == old
    (store / "generation.0.json").write_bytes(b'{"checksum":"x","counter":1e999}')
    assert Store(store).current() == old


def test_one_image_gets_one_prediction_and_many_get_a_list(store: Path, tmp_path: Path) -> None:
    device, pixels = Device.open(store, threads=1), images(1)[0]
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    right = device.predict([pixels])[0]
    for one in (pixels, path, str(path), path.read_bytes(), Image.fromarray(pixels)):
        found = device.predict(one)
        assert isinstance(found, Prediction)
        assert (found.label, found.confidence) == found.top[0]
        assert found.label == right.label
        assert found.confidence == pytest.approx(right.confidence, abs=1e-5)
    assert device.predict(pixels[:, :, 0]).generation == 1
    assert right.to_dict() == {
        "known": True,
        "score": right.score,
        "threshold": None,
        "generation": 1,
        "top": [{"class": right.label, "probability": right.confidence}],
    }
    many = [str(path), path, pixels]
    for several in (many, tuple(many), iter(many), np.stack([pixels] * 3)):
        answers = device.predict(several)
        assert isinstance(answers, list)
        assert [answer.label for answer in answers] == [right.label] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        None,
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros(4, np.uint8),
        [5],
        [np.zeros((4, 4, 3), np.float32)],
        [["photo.jpg"]],
    ],
)
def test_what_is_no_image_is_a_type_error_that_says_what_is(store: Path, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"is no image: pass a path \(str or Path\), .*Pillow"):
        Device.open(store, threads=1).predict(wrong)
