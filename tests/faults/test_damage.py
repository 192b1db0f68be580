"""One wrong byte in any stored file: found, named, and never served; what can be served in spite of it, is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import Fleet, Result, snapshot
from faults.scenarios import Fixture, flip

from sdlora_edge.device import Device
from sdlora_edge.device.records import RECORD_LIMIT
from sdlora_edge.device.store import Store
from sdlora_edge.errors import HealthError, InputError, TrustError
from sdlora_edge.formats.bundle import open_bundle

Cli = Callable[..., Result]


@pytest.fixture
def used(fleet: Fleet, store: Path) -> Path:
    """A store that has applied two packets: generation 3 in force."""
    device = Device.open(store)
    for path in fleet.packets[:2]:
        device.apply(path)
    return store


def places(path: Path) -> Iterable[int]:
    """Where to damage a file: everywhere where it is small; else the first and last byte, and in each part of it."""
    data = path.read_bytes()
    if len(data) < 400:
        return range(len(data))
    found = {0, len(data) - 1, *range(5, len(data), len(data) // 4)}
    if (
        path.suffix != ".onnx" and path.suffix != ".json"
    ):  # safetensors: the header's length, the header, each tensor
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        found |= {
            7,
            8,
            7 + length,
            *(
                8 + length + t["data_offsets"][0]
                for t in list(table.values())[:20]
                if "data_offsets" in t and t["data_offsets"][0] < t["data_offsets"][1]
            ),
        }
    return sorted(found)


def test_one_wrong_byte_in_any_file_of_the_bundle(used: Path) -> None:
    for path in sorted((used / "bundle").iterdir()):
        for place in places(path):
            flip(path, place)
            with pytest.raises(InputError, match=r"bundle|manifest"):
                Device.open(used)
            flip(path, place)
    for place in range((used / "bundle" / "manifest.json").stat().st_size):
        flip(used / "bundle" / "manifest.json", place)
        with contextlib.suppress(InputError):
            assert open_bundle(used / "bundle").id != Store(used).current().bundle
        flip(used / "bundle" / "manifest.json", place)
    Device.open(used)


def test_one_wrong_byte_in_a_packet_serves_the_generation_before_it(
    device_life: Fixture, used: Path
) -> None:
    packets = Store(used).current().packets
    for task, digest in enumerate(packets):
        path = used / "packets" / digest
        for place in places(path):
            flip(path, place)
            device = Device.open(used, threads=1)
            status = device.status()
            assert device_life.digest(device) == device_life.logits[task]
            assert (status.task, status.highest_task, status.generation) == (task, 2, 0)
            assert digest in status.damage[0]
            assert [d.file for d in Device.verify(used).damage] == [f"packets/{digest}"]
            flip(path, place)
    assert device_life.digest(Device.open(used)) == device_life.logits[2]


def test_one_wrong_byte_in_a_record_leaves_the_other_one(device_life: Fixture, used: Path) -> None:
    record = Store(used).current()
    for name in ("generation.0.json", "generation.1.json"):
        for place in places(used / name):
            bits = (1, 0x20, 0xFF)[place % 3]
            flip(used / name, place, bits)
            assert Store(used).current() == record
            flip(used / name, place, bits)
        flip(used / name, 30)
        device = Device.open(used, threads=1)
        assert (device_life.digest(device), device.status().generation) == (
            device_life.logits[2],
            3,
        )
        assert name in device.status().damage[0]
        assert [d.file for d in Device.verify(used).damage] == [name]
        flip(used / name, 30)


@pytest.mark.parametrize("attempts", [0, 1])
def test_either_record_of_a_fresh_store_may_be_lost(
    device_life: Fixture, store: Path, attempts: int
) -> None:
    """Before the first packet, and after one whose canary failed."""
    for _ in range(attempts):
        with pytest.raises(HealthError):
            Device.open(store).apply(device_life.wrong)
    for name in ("generation.0.json", "generation.1.json"):
        kept = (store / name).read_bytes()
        (store / name).unlink()
        device = Device.open(store, threads=1)
        assert device_life.digest(device) == device_life.logits[0]
        assert device.status().generation == 1
        (store / name).write_bytes(kept)
    (store / name).unlink()
    assert Device.open(store).apply(device_life.fleet.packets[0]).damage == ()


def test_a_record_of_absurd_size_leaves_the_other_one(device_life: Fixture, used: Path) -> None:
    for name in ("generation.0.json", "generation.1.json"):
        kept = (used / name).read_bytes()
        os.truncate(used / name, RECORD_LIMIT + 1)
        device = Device.open(used, threads=1)
        assert name in device.status().damage[0]
        assert device_life.digest(device) == device_life.logits[2]
        (used / name).write_bytes(kept)


def test_the_lock_holds_nothing(device_life: Fixture, used: Path) -> None:
    (used / "lock").write_bytes(b"x")
    assert Device.verify(used).intact
    assert Device.open(used).apply(device_life.fleet.packets[2]).task == 3


def test_a_damaged_packet_is_repaired_by_applying_it_again(
    device_life: Fixture, used: Path
) -> None:
    """Only by its own bytes: nothing that was confirmed is forgotten, nothing older is let in."""
    first, second, third = device_life.fleet.packets
    running = Device.open(used, threads=1)
    for digest in Store(used).current().packets:
        flip(used / "packets" / digest, 50)
    device = Device.open(used, threads=1)
    assert (device.status().task, device.status().highest_task) == (0, 2)
    with pytest.raises(InputError):
        device.apply(used / "packets" / digest)
    record = Store(used).current()
    status = device.apply(first)
    assert (status.task, status.highest_task, len(status.damage)) == (1, 2, 1)
    status = device.apply(second)
    assert (status.task, status.damage, status.generation) == (2, (), 3)
    assert Store(used).current() == record
    assert device_life.digest(device) == device_life.digest(running) == device_life.logits[2]
    assert device.apply(third).task == 3


def test_a_rollback_of_a_damaged_generation_keeps_what_is_left(
    device_life: Fixture, used: Path, cli: Cli
) -> None:
    flip(used / "packets" / Store(used).current().packets[-1], -1)
    assert cli("device", "rollback", "--store", used).code == 0
    device = Device.open(used, threads=1)
    assert (
        device.status().task,
        device.status().highest_task,
        device.status().damage,
    ) == (1, 2, ())
    assert device.apply(device_life.fleet.packets[1], allow_older=True).damage == ()
    assert device_life.digest(device) == device_life.logits[2]


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_revocation_on_a_device_with_a_damaged_packet(
    device_life: Fixture, used: Path, damaged: int
) -> None:
    """It goes through: task 2 is not served, repaired or not, and task 1 is kept for its own bytes to repair."""
    fleet, store = device_life.fleet, used
    flip(store / "packets" / Store(store).current().packets[damaged - 1], -1)
    device = Device.open(store, threads=1)
    assert device.apply(device_life.orders.revocation).revoked == ((2, 0),)
    with contextlib.suppress(TrustError):  # the revoked one
        device.apply(fleet.packets[damaged - 1])
    for one in (device, Device.open(store, threads=1)):
        assert one.status().task == 1
        assert device_life.digest(one) == device_life.logits[1]
    assert device.apply(device_life.orders.revised[1], allow_older=True).damage == ()
    assert device_life.digest(Device.open(store, threads=1)) == device_life.logits[2]


def test_verify_reports_and_changes_nothing(used: Path, cli: Cli, tmp_path: Path) -> None:
    result = cli("device", "verify", "--store", used, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["intact"]
    assert (report["files"], report["serves"]) == (10, {"generation": 3, "task": 2})
    assert report["bytes"] == sum(len(data) for data in snapshot(used).values())
    (used / "packets" / ("ab" * 32)).touch()
    shutil.copytree(used, tmp_path / "damaged")
    damaged = tmp_path / "damaged"
    for name in (
        "generation.0.json",
        "bundle/model.onnx",
        f"packets/{Store(used).current().packets[0]}",
    ):
        flip(damaged / name, 9)
    before = snapshot(damaged)
    result = cli("device", "verify", "--store", damaged, "--json")
    assert result.code == 3
    report = json.loads(result.out)
    assert {d["file"] for d in report["damage"]} == {
        "generation.0.json",
        "bundle/model.onnx",
        f"packets/{Store(used).current().packets[0]}",
    }
    assert (report["leftovers"], report["serves"]) == ([f"packets/{'ab' * 32}"], None)
    assert "3 damaged" in cli("device", "verify", "--store", damaged).out
    assert snapshot(damaged) == before
    (damaged / "generation.1.json").unlink()
    assert {d.file for d in Device.verify(damaged).damage} >= {
        "generation.0.json",
        "generation.1.json",
    }
    assert cli("device", "verify", "--store", tmp_path).code == 3
