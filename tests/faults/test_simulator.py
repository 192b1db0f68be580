"""The simulator sees a damaged store: each of these is a mistake one could make, and each is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults.scenarios import Fixture
from faults.simulator import Simulator

from sdlora_edge.device import store
from sdlora_edge.device.records import PENDING, Generation
from sdlora_edge.device.store import Store
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.storage import atomic, disk


def no_sync_of_records(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    def write(
        path: Path, chunks: Iterable[bytes], mode: int = 0o644, like: Path | None = None
    ) -> None:
        simulator.write(path, chunks, mode, like, synced="generation" not in path.name)

    patch.setattr(disk, "write", write)


def no_sync_of_folders(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disk, "sync", lambda path: None)


def no_sync_of_its_name(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        disk, "sync", lambda path: None if path.name == "device" else simulator.sync(path)
    )


def named_before_it_is_filled(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def new_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
        atomic.make_folder(path)
        yield path
        atomic._sync_all(path)

    patch.setattr(atomic, "new_folder", new_folder)


def written_in_place(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """Into both records at once: one alone is safe, for the other one is used while its checksum does not fit."""

    def write(path: Path, record: Generation) -> None:
        paths = [path.with_name(f"generation.{slot}.json") for slot in (0, 1)]
        for one in paths:
            simulator.overwrite(one, record.to_json(), synced=False)
        for one in paths:
            disk.sync(one)

    patch.setattr(store, "_write_record", write)


def confirmed_before_the_packet_is_synced(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    def add_packet(opened: Store, data: bytes) -> str:
        simulator.write(opened.path / "packets" / sha256(data), [data], synced=False)
        return sha256(data)

    patch.setattr(Store, "add_packet", add_packet)


def confirmed_before_the_names_are_synced(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """Of the packets of a batch, whose folder is synced once for all of them."""
    patch.setattr(Store, "keep_names", lambda opened: None)


def swept_for_each_packet(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """As if each update of a batch came alone: it removes those before it, which no record names yet."""
    add_packet = Store.add_packet

    def add(opened: Store, data: bytes) -> str:
        opened.sweep()
        return add_packet(opened, data)

    patch.setattr(Store, "add_packet", add)


def unlinked_too_early(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """The packets that a generation will no longer need, before it is confirmed."""
    write = store._write_record

    def early(path: Path, record: Generation) -> None:
        write(path, record)
        for name in disk.names(path.parent / "packets"):
            if record.status == PENDING and name not in record.packets:
                disk.unlink(path.parent / "packets" / name)

    patch.setattr(store, "_write_record", early)


def revocation_forgotten(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """The device goes back, and would take the revoked task again."""
    replacing = Store.replacing
    patch.setattr(
        Store, "replacing", lambda opened, record: replacing(opened, replace(record, revoked=()))
    )


def revoked_in_two_steps(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """It goes back first, and writes down why in the next generation."""
    replacing = Store.replacing

    @contextlib.contextmanager
    def twice(opened: Store, record: Generation) -> Iterator[Generation]:
        with replacing(opened, replace(record, revoked=opened.current().revoked)):
            pass
        with replacing(opened, record) as generation:
            yield generation

    patch.setattr(Store, "replacing", twice)


def rotation_forgotten(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """The packet of keys is kept, and the next process obeys the old ones."""
    replacing = Store.replacing
    patch.setattr(
        Store, "replacing", lambda opened, record: replacing(opened, replace(record, trust=()))
    )


@pytest.mark.parametrize(
    ("sabotage", "scenario"),
    [
        (no_sync_of_records, "apply"),
        (no_sync_of_folders, "apply"),
        (no_sync_of_folders, "rollback"),
        (written_in_place, "apply"),
        (confirmed_before_the_packet_is_synced, "apply"),
        (confirmed_before_the_names_are_synced, "catch up"),
        (swept_for_each_packet, "catch up"),
        (unlinked_too_early, "rollback"),
        (named_before_it_is_filled, "init"),
        (no_sync_of_its_name, "init"),
        (revocation_forgotten, "revocation"),
        (revoked_in_two_steps, "revocation"),
        (rotation_forgotten, "rotation of keys"),
    ],
)
def test_the_simulator_sees(
    device_life: Fixture, sabotage: Callable[[Simulator, pytest.MonkeyPatch], None], scenario: str
) -> None:
    assert device_life.play(device_life.scenarios()[scenario], sabotage=sabotage).problems


def test_the_simulator_sees_a_second_process_that_builds_on_what_may_be_lost(
    device_life: Fixture,
) -> None:
    """A process dies between the rename of its record and the sync; the next one says: applied already."""
    scenario = device_life.scenarios()["apply"]
    operations = device_life.play(scenario).operations

    def no_sync_by_the_lock(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def lock(opened: Store, name: str = "apply.lock", wait: float = 0.0) -> Iterator[None]:
            with disk.lock(opened.path / name, wait):
                yield

        patch.setattr(Store, "lock", lock)

    plays = (
        device_life.play(scenario, die_at, no_sync_by_the_lock)
        for die_at in range(operations, 0, -1)
    )
    assert any(play.problems for play in plays)
