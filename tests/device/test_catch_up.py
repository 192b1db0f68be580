"""Many packets in one go: the same end as one by one, or the longest beginning that is good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fleet, Result, inputs
from faults.scenarios import Orders
from sdlora_edge.export.parity import host_logits

from sdlora_edge.device import Device
from sdlora_edge.device.device import IN_PLACE
from sdlora_edge.device.generation import Generations
from sdlora_edge.device.store import Store
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import (
    HealthError,
    InputError,
    NotForThisDevice,
    NothingToDo,
    ResourceError,
    SdloraError,
    TrustError,
)
from sdlora_edge.formats import packet, signing
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.inputs import canary
from sdlora_edge.results import AppliedPacket
from sdlora_edge.storage import disk
from sdlora_edge.train.run import Run

Cli = Callable[..., Result]


@pytest.fixture
def device(store: Path) -> Device:
    return Device.open(store, threads=1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often weights are merged, and canaries run."""
    counts = {"load": 0, "check_canary": 0}
    for name in counts:

        def count(*arguments: Any, name: str = name, real: Any = getattr(Generations, name)) -> Any:
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(Generations, name, count)
    return counts


def wrong(fleet: Fleet, folder: Path, task: int) -> Path:
    """The genuine packet of a task, with a canary that no device meets."""
    run, signers = Run.open(fleet.run), [signing.load_signer(fleet.key)]
    contents = packet.Contents(
        lineage=run.lineage,
        begin=run.states[task - 1].digest,
        updates=(run.updates[task - 1],),
        canary_seed=9,
        canary_logits=host_logits(run, task, canary.inputs(9, run.preprocessing)) + 3.0,
    )
    path = folder / f"wrong{task}.sdlora"
    path.write_bytes(packet.build(contents, lambda payload: signing.sign(payload, signers)))
    return path


def test_packets_in_one_go_are_what_they_are_one_by_one(
    fleet: Fleet, device: Device, tmp_path: Path, counted: dict[str, int]
) -> None:
    Device.init(fleet.bundle, tmp_path / "other")
    other = Device.open(tmp_path / "other", threads=1)
    for path in fleet.packets:
        other.apply(path)
    counted.update(load=0, check_canary=0)
    done = device.apply_all(fleet.packets)
    assert counted == {"load": 1, "check_canary": 1}
    assert [(one.file, one.kind, one.task, one.generation) for one in done.applied] == [
        (path, "update", task, 2) for task, path in enumerate(fleet.packets, 1)
    ]
    assert (done.task, done.generation, done.packets, done.skipped) == (3, 2, 3, ())
    assert done.canary_difference == done.applied[-1].canary_difference is not None
    assert done.apply_ms > 0
    assert np.array_equal(device.logits(inputs(device)), other.logits(inputs(device)))
    for name, weight in other.current()[1].items():
        assert np.array_equal(device.current()[1][name], weight), name
    again = Device.open(device._store.path, threads=1).status()
    assert (again.task, again.damage, again.state) == (3, (), other.status().state)
    assert device.rollback().task == 2, "each packet can still be taken back alone"


def test_names_are_synced_once_for_a_batch(
    fleet: Fleet, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = disk.sync
    monkeypatch.setattr(disk, "sync", lambda path: (synced.append(path.name), sync(path)))
    device.apply_all(fleet.packets)
    assert synced.count("packets") == 2, "once by the lock, once for three packets"


def test_those_that_are_held_are_skipped_and_so_is_one_that_is_named_twice(
    fleet: Fleet, device: Device
) -> None:
    first, second, third = fleet.packets
    told: list[tuple[Path, bool]] = []
    device.apply(first)
    done = device.apply_all(
        [first, second, str(second), third, first],
        told=lambda one: told.append((one.file, isinstance(one, AppliedPacket))),
    )
    assert [one.file for one in done.applied] == [second, third]
    assert [(one.file, one.reason) for one in done.skipped] == [
        (path, "this packet is applied already") for path in (first, second, first)
    ]
    order = [(first, False), (second, True), (second, False), (third, True), (first, False)]
    assert told == order
    before = device.status()
    nothing = device.apply_all(fleet.packets)
    assert (nothing.applied, len(nothing.skipped), nothing.canary_difference) == ((), 3, None)
    assert device.status() == before
    assert device.apply_all([]).task == 3
    with pytest.raises(NothingToDo, match=r"^this packet is applied already"):
        device.apply(third)


def spoilt(fleet: Fleet, folder: Path, kind: str) -> tuple[Path, type[SdloraError]]:
    path = folder / f"{kind}.sdlora"
    if kind == "damaged":
        path.write_bytes(fleet.packets[1].read_bytes()[:-1])
        return path, InputError
    if kind == "missing":
        return path, InputError
    if kind == "forged":
        key, _ = signing.new_key("other", folder / "keys")
        other = Fleet(fleet.run, fleet.bundle, fleet.packets, key, fleet.trust)
        return wrong(other, folder, 2), TrustError
    return fleet.packets[2], NotForThisDevice


@pytest.mark.parametrize("kind", ["damaged", "missing", "forged", "out of order"])
@pytest.mark.parametrize("swap", ["double_buffer", IN_PLACE])
def test_what_comes_before_a_refused_packet_is_in_force_and_the_error_names_its_file(
    fleet: Fleet, store: Path, tmp_path: Path, kind: str, swap: str
) -> None:
    device = Device.open(store, threads=1, swap=swap)
    bad, error = spoilt(fleet, tmp_path, kind)
    with pytest.raises(error) as found:
        device.apply_all([fleet.packets[0], bad, fleet.packets[1]])
    assert str(found.value).startswith(f"{bad}: ")
    assert (device.status().task, Device.open(store, threads=1).status().task) == (1, 1)
    assert device.predict(np.zeros((16, 16, 3), np.uint8)).label in device.status().classes
    assert device.apply_all(fleet.packets).task == 3


@pytest.mark.parametrize(
    ("bad", "task"), [((3,), 2), ((2, 3), 1), ((1, 2, 3), 0), ((1, 3), 2), ((1, 2), 3)]
)
@pytest.mark.parametrize("swap", ["double_buffer", IN_PLACE])
def test_the_longest_beginning_whose_canary_passes_is_in_force(
    fleet: Fleet, store: Path, tmp_path: Path, bad: tuple[int, ...], task: int, swap: str
) -> None:
    """Health need not be monotone: a packet whose canary fails may have a successor that passes."""
    device = Device.open(store, threads=1, swap=swap)
    paths = [
        wrong(fleet, tmp_path, number) if number in bad else path
        for number, path in enumerate(fleet.packets, 1)
    ]
    if task == 3:
        assert device.apply_all(paths).task == 3
        return
    told: list[Path] = []
    with pytest.raises(HealthError) as found:
        device.apply_all(paths, told=lambda one: told.append(one.file))
    assert str(found.value).startswith(f"{paths[task]}: ")
    assert told == paths[:task]
    again = Device.open(store, threads=1)
    assert (device.status().task, again.status().task, again.status().damage) == (task, task, ())
    assert np.array_equal(device.logits(inputs(device)), again.logits(inputs(device)))
    assert device.apply_all(fleet.packets[task:]).task == 3
    Store(store).sweep()
    held = set(Store(store).current().digests)
    assert {path.name for path in (store / "packets").iterdir()} == held, "the rest is swept"


def test_a_rollback_passes_over_a_state_that_was_never_proved(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    device = Device.open(store, threads=1)
    device.apply_all([fleet.packets[0], wrong(fleet, tmp_path, 2), fleet.packets[2]])
    assert (device.rollback().task, Device.open(store, threads=1).status().task) == (1, 1)
    assert device.apply_all(fleet.packets[1:], allow_older=True).task == 3


def test_of_two_errors_the_earlier_packets_comes_first(
    fleet: Fleet, device: Device, tmp_path: Path
) -> None:
    bad, (cut, _) = wrong(fleet, tmp_path, 2), spoilt(fleet, tmp_path, "damaged")
    with pytest.raises(HealthError) as found:
        device.apply_all([fleet.packets[0], bad, cut])
    assert str(found.value).startswith(f"{bad}: ")
    assert device.status().task == 1


def test_keys_and_revocations_hold_for_what_follows_them(
    fleet: Fleet, device: Device, tmp_path: Path
) -> None:
    orders = Orders(fleet, tmp_path)
    done = device.apply_all([*fleet.packets[:2], orders.rotation, orders.renewed[2]])
    assert [one.kind for one in done.applied] == ["update", "update", "trust", "update"]
    assert [one.generation for one in done.applied] == [2, 2, 3, 4]
    assert [one.task for one in done.applied] == [1, 2, 2, 3]
    assert (done.task, done.trust_version) == (3, 2)
    revoking = [orders.renewed_revocation, orders.renewed_revocation, orders.renewed[1]]
    with pytest.raises(TrustError) as found:
        device.apply_all(revoking, allow_older=True)
    assert str(found.value).startswith(f"{orders.renewed[1]}: ")
    status = device.status()
    assert (status.task, status.revoked) == (1, ((2, 0),))
    revised = device.apply_all([orders.renewed_and_revised[1], orders.renewed_and_revised[2]])
    assert (revised.task, revised.revision) == (3, 1)


def test_a_packet_that_only_the_old_keys_signed_is_refused_after_the_rotation(
    fleet: Fleet, device: Device, tmp_path: Path
) -> None:
    orders = Orders(fleet, tmp_path)
    with pytest.raises(TrustError) as found:
        device.apply_all([fleet.packets[0], orders.rotation, fleet.packets[1]])
    assert str(found.value).startswith(f"{fleet.packets[1]}: ")
    assert (device.status().task, device.status().trust_version) == (1, 2)


def test_a_squash_in_the_middle(fleet: Fleet, device: Device, tmp_path: Path) -> None:
    orders = Orders(fleet, tmp_path)
    done = device.apply_all([orders.squashes[0], *fleet.packets])
    assert [one.task for one in done.applied] == [2, 3]
    assert [one.file for one in done.skipped] == fleet.packets[:2]


def test_if_memory_runs_out_no_packet_is_judged(
    fleet: Fleet, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def short(*arguments: object) -> None:
        tried.append(1)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Generations, "check_canary", short)
        with pytest.raises(ResourceError):
            device.apply_all(fleet.packets)
    assert (len(tried), device.status().task) == (1, 0)
    assert device.apply_all(fleet.packets).task == 3


def test_damaged_packets_are_repaired_on_the_way(fleet: Fleet, store: Path) -> None:
    Device.open(store, threads=1).apply_all(fleet.packets[:2])
    for digest in Store(store).current().packets:
        (store / "packets" / digest).write_bytes(b"")
    device = Device.open(store, threads=1)
    assert device.status().task == 0
    done = device.apply_all(fleet.packets)
    assert [one.task for one in done.applied] == [1, 2, 3]
    assert (done.task, done.damage, done.packets) == (3, (), 3)


def test_the_command_prints_each_packet_and_what_is_in_force(
    fleet: Fleet, store: Path, tmp_path: Path, cli: Cli
) -> None:
    first, second, third = fleet.packets
    lines = cli("device", "apply", first, second, "--store", store).out.splitlines()
    assert lines[:2] == [f"{first}: task 1", f"{second}: task 2"]
    assert lines[2].startswith("task 2 in force, ")
    bad = wrong(fleet, tmp_path, 3)
    found = cli("device", "apply", first, bad, "--store", store, "--json")
    value = json.loads(found.out)
    assert (found.code, value["applied"]) == (6, [])
    assert value["skipped"] == [{"file": str(first), "reason": "this packet is applied already"}]
    assert value["error"]["message"].startswith(f"{bad}: ")
    value = json.loads(cli("device", "apply", third, "--store", store, "--json").out)
    assert {"task", "state", "classes", "applied", "skipped", "apply_ms"} <= value.keys()
    assert value["applied"][0]["file"] == str(third)


def watched(store: Path, folder: Path) -> tuple[Watcher, list[tuple[str, dict[str, Any]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    emit = lambda event, fields: events.append((event, fields))  # noqa: E731
    return Watcher(folder, store, None, emit, threads=1), events


def test_a_watcher_applies_what_waits_as_one(fleet: Fleet, store: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    for path in fleet.packets:
        shutil.copy(path, folder)
    watcher, events = watched(store, folder)
    report = watcher.look(settled=False)
    assert (report.device.task, report.device.generation, report.counts.applied) == (3, 2, 3)
    assert [(event, fields["task"]) for event, fields in events] == [
        ("applied", task) for task in (1, 2, 3)
    ]
    assert json.loads((store / "watch.json").read_text())["together"] == []


def test_a_watcher_remembers_the_one_packet_that_fails(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    (folder := tmp_path / "in").mkdir()
    bad = wrong(fleet, tmp_path, 3)
    for path in (*fleet.packets[:2], bad):
        shutil.copy(path, folder)
    watcher, events = watched(store, folder)
    report = watcher.look(settled=False)
    assert [event for event, _ in events] == ["applied", "applied", "failed"]
    assert (report.device.task, report.counts.failed) == (2, 1)
    assert json.loads((store / "watch.json").read_text())["failed"] == [sha256(bad.read_bytes())]


def test_after_a_process_was_killed_over_a_batch_each_packet_is_tried_alone(
    fleet: Fleet, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "in").mkdir()
    for path in fleet.packets:
        shutil.copy(path, folder)
    digests = [sha256(path.read_bytes()) for path in fleet.packets]
    memory = {"failed": [], "killed": {}, "together": digests, "trying": None}
    (store / "watch.json").write_text(json.dumps(memory))
    alone: list[str] = []
    apply = Device.apply
    monkeypatch.setattr(
        Device, "apply", lambda device, path: (alone.append(path.name), apply(device, path))[1]
    )
    watcher, _ = watched(store, folder)
    assert watcher.look(settled=False).device.task == 3
    assert alone == [path.name for path in fleet.packets]
    kept = json.loads((store / "watch.json").read_text())
    assert (kept["singly"], kept["together"], kept["killed"]) == ([], [], {})
