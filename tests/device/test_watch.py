"""Whatever arrives in a watched folder, in whatever order, the device ends where it should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Fleet, Result, snapshot
from faults.scenarios import Orders
from sdlora_edge.export.parity import host_logits

from sdlora_edge.device import Device
from sdlora_edge.device.store import Store
from sdlora_edge.device.watch import memory, policy, service
from sdlora_edge.device.watch.journal import Counts, WatchReport
from sdlora_edge.device.watch.memory import Memory
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import InputError, StorageError
from sdlora_edge.formats import control, packet, signing
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.inputs import canary
from sdlora_edge.storage import atomic
from sdlora_edge.train.run import Run

Cli = Callable[..., Result]


class Watched:
    """A watcher, and the events it told."""

    def __init__(self, folder: Path, store: Path, status: Path | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.watcher = Watcher(
            folder,
            store,
            status,
            lambda event, fields: self.events.append((event, fields)),
            threads=1,
        )

    def look(self, settled: bool = False) -> tuple[WatchReport, list[str]]:
        """(report, the events of this look)."""
        before = len(self.events)
        report = self.watcher.look(settled)
        return report, [event for event, _ in self.events[before:]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def built(fleet: Fleet, task: int, shift: float = 0.0, key: Path | None = None) -> bytes:
    """The run's packet of a task, made again; `shift` is added to the canary."""
    run, signers = Run.open(fleet.run), [signing.load_signer(key or fleet.key)]
    logits = host_logits(run, task, canary.inputs(9, run.preprocessing)) + shift
    contents = packet.Contents(
        lineage=run.lineage,
        begin=run.states[task - 1].digest,
        updates=(run.updates[task - 1],),
        canary_seed=9,
        canary_logits=logits,
    )
    return packet.build(contents, lambda payload: signing.sign(payload, signers))


def test_packets_are_applied_in_their_order_whatever_they_are_called(
    fleet: Fleet, store: Path, folder: Path
) -> None:
    for name, path in zip(("c", "b", "a"), fleet.packets, strict=True):
        shutil.copy(path, folder / f"{name}.sdlora")
    before = snapshot(folder)
    watched = Watched(folder, store)
    report, events = watched.look()
    assert events == ["applied"] * 3
    assert [fields["task"] for _, fields in watched.events] == [1, 2, 3]
    assert (report.device.task, report.counts.applied, report.last_error) == (3, 3, None)
    assert watched.look()[1] == []
    assert Watched(folder, store).look()[1] == [], "what the store holds is not tried again"
    assert snapshot(folder) == before


def test_a_later_packet_waits_for_those_before_it(fleet: Fleet, store: Path, folder: Path) -> None:
    watched = Watched(folder, store)
    shutil.copy(fleet.packets[2], folder)
    shutil.copy(fleet.packets[1], folder)
    assert watched.look()[1] == ["waiting", "waiting"]
    assert watched.look()[1] == []
    shutil.copy(fleet.packets[0], folder)
    assert watched.look()[1] == ["applied"]
    report, events = watched.look()  # in another generation, those that waited are tried again
    assert events == ["applied", "applied"]
    assert report.device.task == 3


def test_a_file_counts_once_it_is_whole(fleet: Fleet, store: Path, folder: Path) -> None:
    watched, path, data = Watched(folder, store), folder / "p.sdlora", fleet.packets[0].read_bytes()
    path.write_bytes(data[:1000])
    assert watched.look(settled=True)[1] == [], "it may still grow"
    path.write_bytes(data[:2000])
    assert watched.look(settled=True)[1] == []
    assert watched.look(settled=True)[1] == ["refused"]
    assert watched.look(settled=True)[1] == [], "it is the same, and not tried again"
    path.write_bytes(data)
    assert watched.look(settled=True)[1] == []
    report, events = watched.look(settled=True)
    assert events == ["applied"]
    assert report.counts == Counts(applied=1, waiting=0, refused=1, failed=0)
    shutil.copy(fleet.packets[1], folder / ".partial.sdlora")
    shutil.copy(fleet.packets[1], folder / "partial.sdlora.tmp")
    assert watched.look()[1] == []


def test_forged_and_foreign_files_do_not_stand_in_the_way(
    fleet: Fleet, store: Path, folder: Path, tmp_path: Path
) -> None:
    other, _ = signing.new_key("other", tmp_path / "keys")
    (folder / "0.sdlora").write_bytes(built(fleet, 1, key=other))
    (folder / "1.sdlora").write_bytes(b"\xff" * 500)
    shutil.copy(fleet.packets[0], folder / "2.sdlora")
    with open(folder / "3.sdlora", "wb") as huge:
        huge.truncate(packet.LIMITS.packet + 1)
    watched = Watched(folder, store)
    report, events = watched.look()
    assert sorted(events) == ["applied", "refused", "refused", "refused"]
    assert report.last_error is not None
    assert report.last_error.exit_code in (3, 4)
    assert report.device.task == 1
    watched.look()  # keys might have come with the new generation
    assert watched.look()[1] == []


def test_a_packet_whose_canary_failed_is_never_tried_again_but_a_newer_one_is(
    fleet: Fleet, store: Path, folder: Path, cli: Cli
) -> None:
    (folder / "1.sdlora").write_bytes(built(fleet, 1, shift=3.0))
    result = cli("device", "watch", folder, "--store", store, "--once", "--json")
    assert result.code == 6, result
    assert json.loads(result.out)["counts"]["failed"] == 1
    assert json.loads(result.err.splitlines()[-1])["event"] == "failed"
    assert Device.open(store).status().task == 0
    generation = Store(store).current().counter
    result = cli("device", "watch", folder, "--store", store, "--once", "--json")
    assert (result.code, result.err) == (0, ""), "another process, and it knows"
    (folder / "1.sdlora").touch()
    shutil.copy(folder / "1.sdlora", folder / "copy.sdlora")
    assert Watched(folder, store).look()[1] == []
    assert Store(store).current().counter == generation
    shutil.copy(fleet.packets[0], folder / "newer.sdlora")
    report, events = Watched(folder, store).look()
    assert (report.device.task, events) == (1, ["applied"])


KILLED = """
import os, signal, sys
from pathlib import Path
from sdlora_edge.device import Device
from sdlora_edge.device.watch.service import Watcher
apply, apply_all = Device.apply, Device.apply_all
def killed(self, path):
    if path.name == "1.sdlora":
        os.kill(os.getpid(), signal.SIGKILL)
    return apply(self, path)
def all_killed(self, paths, told):
    if any(path.name == "1.sdlora" for path in paths):
        os.kill(os.getpid(), signal.SIGKILL)
    return apply_all(self, paths, told=told)
Device.apply, Device.apply_all = killed, all_killed
Watcher(Path(sys.argv[1]), Path(sys.argv[2])).look(settled=False)
"""


@pytest.mark.parametrize("times", [3, 4])
def test_a_packet_that_kills_its_process_is_given_up(
    fleet: Fleet, store: Path, folder: Path, times: int
) -> None:
    """An update that takes all memory must not restart a device for ever. Two power cuts may.

    The first process dies over all packets as one, and nobody knows yet which one is at fault.
    """
    shutil.copy(fleet.packets[0], folder / "1.sdlora")
    trust = control.build_trust(
        fleet.trust, lambda payload: signing.sign(payload, [signing.load_signer(fleet.key)])
    )
    (folder / "keys.sdlora").write_bytes(trust)  # tried before it each time, and nothing to do
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, folder, store], stderr=subprocess.PIPE, check=False
        )
        assert done.returncode == -signal.SIGKILL
    if times == 3:
        assert Watched(folder, store).look()[1] == ["applied"]
        return
    report, events = Watched(folder, store).look()
    assert (report.device.task, report.counts.failed, events) == (0, 1, ["failed"])
    assert Watched(folder, store).look()[1] == []  # another process knows it, too
    (folder / "newer.sdlora").write_bytes(built(fleet, 1))
    assert Watched(folder, store).look()[1] == ["applied"]


def test_a_packet_given_up_is_tried_again_after_a_pause_or_a_restart(
    fleet: Fleet, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have taken the memory. Each pause is twice as long; a restart ends it."""
    shutil.copy(fleet.packets[0], folder / "1.sdlora")
    digest, clock, boot = sha256(fleet.packets[0].read_bytes()), [1e9], tmp_path / "boot_id"
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(memory, "BOOT", boot)

    for times, hours in (3, 1), (4, 2), (5, 4), (9, 24), (10**9, 24):
        boot.write_text("one")
        (store / "watch.json").write_text(
            json.dumps({"failed": [], "killed": {digest: times - 1}, "trying": digest})
        )
        watched = Watched(folder, store)
        assert watched.look()[1] == ["failed"]
        clock[0] += hours * 3600 - 60
        assert watched.look()[1] == []
        assert Watched(folder, store).look()[1] == [], "another process knows it, too"
        left_alone = Memory(Store(store))
        left_alone.recollect()
        assert left_alone.left_alone() == {digest}
        clock[0] -= 2 * 24 * 3600
        assert not left_alone.left_alone(), "the clock was set back"
        clock[0] += 2 * 24 * 3600 + 61
        assert not left_alone.left_alone()
        clock[0] -= 61
    boot.write_text("two")
    assert Watched(folder, store).look()[1] == ["applied"]
    assert json.loads((store / "watch.json").read_text())["paused"] == {}


def test_a_sweep_leaves_what_a_watcher_is_writing(store: Path) -> None:
    """It holds another lock."""
    for name in (".tmp-watch.json", ".tmp-generation.0.json"):
        (store / name).write_bytes(b"{}")
    Store(store).sweep()
    assert [path.name for path in store.glob(".tmp-*")] == [".tmp-watch.json"]


def test_a_packet_damaged_after_it_was_applied_is_repaired(
    fleet: Fleet, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(fleet.packets[0], folder)
    watched = Watched(folder, store)
    assert watched.look()[1] == ["applied"]
    kept = store / "packets" / Store(store).current().packets[-1]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert watched.look()[1] == [], "not looked for all the time"
    monkeypatch.setattr(service, "HEARTBEAT", 0.0)
    report, events = watched.look()
    assert (report.device.task, report.device.damage, events) == (1, (), ["applied"])
    assert not Store(store).damaged([kept.name])
    kept.write_bytes(b"")
    (folder / fleet.packets[0].name).unlink()
    assert watched.look()[0].device.damage != ()
    monkeypatch.setattr(service, "HEARTBEAT", 3600.0)
    shutil.copy(fleet.packets[0], folder)
    report, events = watched.look()
    assert (report.device.task, report.device.damage, events) == (1, (), ["applied"]), (
        "as soon as its file comes"
    )
    assert watched.look()[1] == []


@pytest.mark.parametrize("trying", [[1], {"a": 1}, 5, "x", None, "a" * 64])
def test_whatever_the_memory_of_an_attempt_holds_a_watcher_works(
    fleet: Fleet, store: Path, folder: Path, trying: object
) -> None:
    shutil.copy(fleet.packets[0], folder / "1.sdlora")
    (store / "watch.json").write_text(json.dumps({"failed": [], "killed": {}, "trying": trying}))
    assert Watched(folder, store).look()[1] == ["applied"]


def test_a_wrong_signature_is_not_verified_again_before_the_keys_change(
    fleet: Fleet, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = signing.new_key("other", tmp_path / "keys")
    (folder / "forged.sdlora").write_bytes(built(fleet, 1, key=other))
    verified, read_any = [0], policy.read_any

    def counted(data: bytes, trust: signing.Trust) -> Any:
        verified[0] += 1
        return read_any(data, trust)

    watched = Watched(folder, store)
    monkeypatch.setattr(policy, "read_any", counted)
    for path in fleet.packets:
        shutil.copy(path, folder)
        watched.look()
    assert verified[0] == 1 + len(fleet.packets)


def test_of_two_watchers_one_waits(fleet: Fleet, store: Path, folder: Path) -> None:
    """Else each would take the other for a process that was killed."""
    watched = Watched(folder, store)
    shutil.copy(fleet.packets[0], folder)
    with Store(store).lock("watch.lock"):
        report, events = watched.look()
        assert (report.device.task, events) == (None, ["trouble"])
        assert not (store / "watch.json").exists()
    assert watched.look()[1] == ["applied", "recovered"]


def test_what_was_rolled_back_by_hand_stays_so(fleet: Fleet, store: Path, folder: Path) -> None:
    watched = Watched(folder, store)
    for path in fleet.packets[:2]:
        shutil.copy(path, folder)
    watched.look()
    Device.open(store).rollback()
    for again in (watched, Watched(folder, store)):
        report, _ = again.look()
        assert report.device.task == 1
    shutil.copy(fleet.packets[2], folder)
    assert Watched(folder, store).look()[0].device.task == 1, "task 3 does not follow task 1"


def test_new_keys_and_revocations_go_before_updates(
    fleet: Fleet, store: Path, folder: Path, tmp_path: Path
) -> None:
    private, public = signing.new_key("next", tmp_path / "keys")
    old, new = signing.load_signer(fleet.key), signing.load_signer(private)
    keys = signing.Trust((signing.load_public(public),), 1, fleet.trust.version + 1)
    (folder / "z.sdlora").write_bytes(
        control.build_trust(keys, lambda payload: signing.sign(payload, [old, new]))
    )
    (folder / "b.sdlora").write_bytes(built(fleet, 1, key=private))
    shutil.copy(fleet.packets[0], folder / "a.sdlora")
    watched = Watched(folder, store)
    report, events = watched.look()
    assert events.count("applied") == 1, (
        "the keys alone: the old key's packet is not trusted after them"
    )
    assert report.device.task == 0
    report, events = watched.look()
    assert (report.device.task, "applied" in events) == (1, True)
    revocation = control.build_revocation(
        Run.open(fleet.run).lineage,
        control.Revoked(1, 0),
        lambda payload: signing.sign(payload, [new]),
    )
    (folder / "y.sdlora").write_bytes(revocation)
    assert watched.look()[0].device.task == 0
    assert watched.look()[0].device.task == 0, "what was revoked is not taken again"


def test_a_packet_damaged_in_the_store_is_repaired_from_the_folder(
    fleet: Fleet, store: Path, folder: Path
) -> None:
    for path in fleet.packets:
        shutil.copy(path, folder)
    Watched(folder, store).look()
    newest = store / "packets" / Store(store).current().packets[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    watched = Watched(folder, store)
    report, _ = watched.look()
    assert (report.device.task, len(report.device.damage)) == (2, 1)
    report, events = watched.look()
    assert (report.device.task, report.device.damage, events) == (3, (), ["applied"])


def test_damaged_keys_and_what_retired_keys_signed_are_repaired_from_the_folder(
    fleet: Fleet, store: Path, folder: Path, tmp_path: Path
) -> None:
    """Whoever signs now; and what was refused while nobody knew who may sign is tried again."""
    control, device = Orders(fleet, tmp_path), Device.open(store, threads=1)
    chain = [fleet.packets[0], control.rotation, control.renewed[1]]
    for path in chain:
        device.apply(path)
    for digest in Store(store).current().digests:
        (store / "packets" / digest).write_bytes(b"")
    shutil.copy(control.renewed[2], folder)
    watched = Watched(folder, store)
    assert watched.look()[1] == ["refused"]
    for path in chain:
        shutil.copy(path, folder)
    report, events = watched.look()
    assert (report.device.task, report.device.damage, set(events)) == (2, (), {"applied"})
    report, events = watched.look()
    assert (report.device.task, events) == (3, ["applied"])


def test_a_missing_folder_an_unreadable_file_and_a_full_disk_are_survived(
    fleet: Fleet, store: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rmdir()
    watched = Watched(folder, store, tmp_path / "status.json")
    assert watched.look()[1] == ["folder"]
    assert watched.look()[1] == [], "said once"
    folder.mkdir()
    assert watched.look()[1] == ["recovered"]
    shutil.copy(fleet.packets[0], folder / "p.sdlora")
    read = atomic.read

    def unreadable(path: Path, limit: int | None = None) -> bytes:
        if path.name == "p.sdlora":
            raise InputError(f"{path}: Input/output error")
        return read(path, limit)

    def full(path: Path, data: bytes, **_: object) -> None:
        raise StorageError(f"{path} cannot be written: No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(atomic, "read", unreadable)
        assert watched.look()[1] == ["unreadable"]
        assert watched.look()[1] == []
    with monkeypatch.context() as disk:
        disk.setattr(atomic, "write", full)
        report, events = watched.look()
        assert events == ["trouble", "status"]
        assert "No space left" in report.trouble
        assert watched.look()[1] == []
    with Store(store).lock():
        assert watched.look()[1] == ["trouble"], "another error, and the packet is tried each time"
    report, events = watched.look()
    assert events == ["applied", "recovered"]
    assert report.trouble is None
    assert json.loads((tmp_path / "status.json").read_text())["task"] == 1


def test_only_a_folder_that_is_no_store_ends_it(cli: Cli, folder: Path) -> None:
    result = cli("device", "watch", folder, "--store", folder)
    assert result.code == 3
    assert "not a store" in result.err


def test_a_service_follows_the_folder_tells_systemd_and_stops_when_asked(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    program = "import sys; from sdlora_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    status, folder = tmp_path / "run" / "status.json", tmp_path / "later"
    arguments = [
        "device",
        "watch",
        folder,
        "--store",
        store,
        "--interval",
        "0.05",
        "--status",
        status,
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [sys.executable, "-c", program, *map(str, arguments)]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment
        ) as service:
            try:
                assert systemd.recv(100).startswith(b"READY=1")
                folder.mkdir()
                for path in fleet.packets:
                    shutil.copy(path, folder)
                    systemd.recv(100)
                deadline = time.monotonic() + 30
                while (
                    not status.exists() or json.loads(status.read_text())["task"] != 3
                ) and time.monotonic() < deadline:
                    systemd.recv(100)
            finally:
                service.send_signal(signal.SIGTERM)
            _, err = service.communicate(timeout=30)
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert events[0] == "started"
    assert events[-1] == "stopped"
    assert events.count("applied") == 3
    assert service.returncode == 0
    assert Device.open(store).status().task == 3


@pytest.mark.parametrize("pulled", ["while the model loads", "between two packets"])
def test_a_stick_pulled_while_packets_are_applied(
    fleet: Fleet, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, pulled: str
) -> None:
    """What could not be read then is applied when the stick is back."""
    away, load = folder.with_name("away"), Device.open
    for path in fleet.packets[:2]:
        shutil.copy(path, folder)

    def slowly(*arguments: Any, **settings: Any) -> Device:
        device = load(*arguments, **settings)
        folder.rename(away)
        return device

    watched = Watched(folder, store)
    if pulled == "while the model loads":
        with monkeypatch.context() as patch:
            patch.setattr(Device, "open", slowly)
            assert watched.look()[1] == []
    else:
        watcher = watched.watcher
        watcher._journal.events.emit = lambda event, fields: (
            folder.rename(away) if event == "applied" else None
        )  # type: ignore[assignment]
        watcher.look(settled=False)
        watcher._journal.events.emit = lambda event, fields: watched.events.append((event, fields))
    assert watched.look()[1] == ["folder"]
    away.rename(folder)
    assert "refused" not in watched.look()[1]
    assert Device.open(store, threads=1).status().task == 2


def test_what_came_in_a_packets_place_is_not_held_against_it(
    fleet: Fleet, store: Path, folder: Path
) -> None:
    shutil.copy(fleet.packets[0], folder / "1.sdlora")
    shutil.copy(fleet.packets[1], folder / "2.sdlora")
    watched = Watched(folder, store)

    def replaced(event: str, fields: dict[str, Any]) -> None:
        if event == "applied":  # the first one
            (folder / "2.sdlora").write_bytes(built(fleet, 2, shift=1.0))

    watched.watcher._journal.events.emit = replaced
    watched.watcher.look(settled=False)
    shutil.copy(fleet.packets[1], folder / "2.sdlora")
    watched.watcher._journal.events.emit = lambda event, fields: None
    assert watched.look()[0].device.task == 2


def test_the_trouble_with_a_file_ends_with_the_file(
    fleet: Fleet, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(folder, store)
    shutil.copy(fleet.packets[0], folder / "p.sdlora")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "receive", lambda path, limit: atomic.read(path / "none"))
        assert watched.look()[1] == ["unreadable"]
    (folder / "p.sdlora").unlink()
    assert watched.look()[0].trouble is None
