"""The power is cut while current.json is replaced: it never names a file that is missing or of another generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet
from faults.simulator import Restarts, Simulator, Tree

from sdlora_edge.device import Device
from sdlora_edge.device.engines import with_room
from sdlora_edge.device.export_weights import export_weights
from sdlora_edge.errors import UsageError
from sdlora_edge.formats.bundle import (
    CLASSES,
    CONSTANTS,
    FACTORS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    MANIFEST,
    TRUST,
    describe,
    open_bundle,
)
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.current import CURRENT, Current

CAPACITY = 12


@pytest.fixture
def bundle(fleet: Fleet, tmp_path: Path) -> Path:
    """The fleet's bundle for ExecuTorch. Its program is none: no program runs here."""
    opened, out = open_bundle(fleet.bundle), tmp_path / "bundle"
    out.mkdir()
    data, places = b"", {}
    head = {HEAD_WEIGHT: opened.state.head_weight, HEAD_BIAS: opened.state.head_bias}
    for name, weight in {**opened.weights, **head}.items():
        room = with_room(name, weight, CAPACITY).astype(np.float32)
        places[name] = {
            "file": "model.ptd",
            "offset": len(data),
            "dtype": "float32",
            "shape": list(room.shape),
        }
        data += room.tobytes()
    (out / "model.pte").write_bytes(b"no program")
    (out / "model.ptd").write_bytes(data)
    for name in (FACTORS, CLASSES, TRUST):
        shutil.copy(fleet.bundle / name, out)
    manifest = replace(
        opened.manifest,
        target="executorch",
        weights_as=CONSTANTS,
        capacity=CAPACITY,
        weights=places,
        files={path.name: describe(path) for path in out.iterdir()},
    )
    (out / MANIFEST).write_bytes(manifest.to_json())
    return out


def current_in(tree: Tree, folder: str) -> Current | None:
    content = tree.get(f"{folder}/{CURRENT}")
    if content is None:
        return None
    value = json.loads(content.data)
    del value["format"]
    return Current(**value)


def files_in(tree: Tree, folder: str, current: Current) -> dict[str, str]:
    """The SHA-256 of the files that a current.json names, as they lie there; without those that are missing."""
    found = {name: tree.get(f"{folder}/{name}") for name in current.files}
    return {name: content.digest for name, content in found.items() if content is not None}


@pytest.mark.parametrize("then", ["apply", "rollback"])
def test_the_pair_of_a_program_is_of_one_generation_at_every_moment(
    fleet: Fleet, bundle: Path, tmp_path: Path, then: str
) -> None:
    root = tmp_path / "disk"
    store = root / "store"
    root.mkdir()
    Device.init(bundle, store, unproved=True)
    Device.open(store, unproved=True).apply(fleet.packets[0])
    states = {Device.open(store, unproved=True).status().state}
    left: dict[object, Tree] = {}

    def at_point(trees: Iterable[Tree]) -> None:
        left.update({frozenset(tree.items()): tree for tree in trees})

    simulator = Simulator(root, at_point)
    with simulator.installed():
        device = Device.open(store, unproved=True)
        device.apply(fleet.packets[1]) if then == "apply" else device.rollback()
        after = device.status().state
        del device
    states.add(after)
    assert len(states) == 2
    seen = set()
    for tree in left.values():
        current = current_in(tree, "store/engine")
        assert current is not None
        assert files_in(tree, "store/engine", current) == current.files
        seen.add(current.state)
    assert seen == states
    ends = [current_in(tree, "store/engine") for tree in simulator.top.trees()]
    assert {end.state for end in ends if end} == {after}

    def restart(folder: Path) -> object:
        """A device that starts makes its workspace agree with its store."""
        state = Device.open(folder / "store", unproved=True).status().state
        current = Current.read(folder / "store" / "engine")
        assert current is not None
        assert current.state == state
        for name, digest in current.files.items():
            assert sha256((folder / "store" / "engine" / name).read_bytes()) == digest
        return state

    (tmp_path / "restarts").mkdir()
    restarts = Restarts(restart, tmp_path / "restarts")
    assert {restarts.outcome(tree) for tree in left.values()} == states


def test_an_adapter_and_its_current_are_each_the_old_one_or_the_new(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    """Between the two renames they differ: whoever compares the SHA-256 notices, and reads again."""
    root = tmp_path / "disk"
    out = root / "served" / "a.onnx_adapter"
    out.parent.mkdir(parents=True)
    device = Device.open(store, threads=1)
    export_weights(device, "adapter", out)
    old = Current.read(out.parent)
    device.apply(fleet.packets[0])
    left: list[Tree] = []
    simulator = Simulator(root, left.extend)
    with simulator.installed():
        export_weights(device, "adapter", out)
    new = Current.read(out.parent)
    assert old is not None
    assert new is not None
    assert (old.task, new.task) == (0, 1)
    digests = {old.files[out.name], new.files[out.name]}
    gaps = 0
    for tree in left:
        current = current_in(tree, "served")
        assert current is not None
        assert current.state in {old.state, new.state}
        (found,) = files_in(tree, "served", current).values()
        assert found in digests
        # current.json never runs ahead: as soon as it names the new state, the adapter is the new
        # one.
        assert current.state == old.state or found == new.files[out.name]
        gaps += found != current.files[out.name]
    assert gaps > 0
    for tree in simulator.top.trees():
        current = current_in(tree, "served")
        assert current is not None
        assert files_in(tree, "served", current) == current.files == new.files


def test_an_exported_ptd_is_the_one_that_the_device_publishes(
    fleet: Fleet, bundle: Path, tmp_path: Path
) -> None:
    store, out = tmp_path / "store", tmp_path / "served" / "now.ptd"
    device = Device.init(bundle, store, unproved=True)
    for packet in fleet.packets:
        device.apply(packet)
        exported = export_weights(device, "ptd", out)
        published, current = Current.read(store / "engine"), Current.read(out.parent)
        assert published is not None
        assert current == replace(published, files={out.name: exported.sha256})
        assert (store / "engine" / f"{exported.sha256}.ptd").read_bytes() == out.read_bytes()
    with pytest.raises(UsageError, match=r"takes no file of format adapter: .*--target onnx"):
        export_weights(device, "adapter", tmp_path / "a.onnx_adapter")


@pytest.mark.parametrize("name", ["../a.ptd", "/a.ptd", "a/b.ptd", "..", ""])
def test_a_current_that_names_a_file_elsewhere_is_none(
    fleet: Fleet, tmp_path: Path, name: str
) -> None:
    """The engine linked such a file into its folder."""
    state = open_bundle(fleet.bundle).state
    Current.of("0" * 64, state, {"a.ptd": "0" * 64}).write(tmp_path)
    assert Current.read(tmp_path) is not None
    Current.of("0" * 64, state, {name: "0" * 64}).write(tmp_path)
    assert Current.read(tmp_path) is None
