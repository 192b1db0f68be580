"""A wrong byte in a packet that changed the keys: the device serves what it can, obeys nobody, and is repaired by the same packet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Fleet, Result, snapshot
from faults.scenarios import Fixture, damage_keys, damage_newest, flip

from sdlora_edge.device import Device
from sdlora_edge.device.store import Store
from sdlora_edge.device.verify import KEYS
from sdlora_edge.errors import InputError, TrustError

Cli = Callable[..., Result]


@pytest.fixture
def rotated(device_life: Fixture, fleet: Fleet, store: Path) -> Path:
    """Task 1 by the old keys, the rotation, task 2 by the new ones."""
    device = Device.open(store, threads=1)
    for path in (fleet.packets[0], device_life.orders.rotation, device_life.orders.renewed[1]):
        device.apply(path)
    return store


def keys_of(store: Path) -> str:
    """The path of its packet of keys, from the store."""
    return f"packets/{Store(store).current().trust[-1][0]}"


def test_damaged_keys_leave_a_device_that_serves_and_obeys_nobody(
    device_life: Fixture, rotated: Path, cli: Cli
) -> None:
    fleet, orders = device_life.fleet, device_life.orders
    name, size = keys_of(rotated), (rotated / keys_of(rotated)).stat().st_size
    for place in (0, 7, size // 2, size - 1):
        flip(rotated / name, place)
        device = Device.open(rotated, threads=1)
        status = device.status()
        assert (
            device_life.digest(device) == device_life.logits[1]
        )  # task 2 was signed by keys that are lost
        assert (status.task, status.highest_task, status.trust_version) == (1, 2, 0)
        (line,) = status.damage
        assert name in line
        assert [(d.file, d.remedy) for d in Device.verify(rotated).damage] == [(name, KEYS)]
        flip(rotated / name, place)
    flip(rotated / name, -1)
    before = snapshot(rotated)
    for path in (
        fleet.packets[1],
        fleet.packets[2],
        orders.revised[1],
        orders.revocation,
        orders.squash,
        orders.renewed[2],
    ):
        result = cli("device", "apply", path, "--store", rotated, "--allow-older")
        assert (result.code, result.out) == (4, "")
        assert name in result.err
    assert snapshot(rotated) == before
    report = json.loads(cli("device", "verify", "--store", rotated, "--json").out)
    assert (report["intact"], report["serves"]["task"]) == (False, 1)


@pytest.mark.parametrize("opened", ["after the damage", "before it"])
def test_the_same_packet_of_keys_repairs_it(
    device_life: Fixture, rotated: Path, opened: str
) -> None:
    """A program that has been running all the while goes on with the keys it knows, and repairs the file all the same."""
    orders, record = device_life.orders, Store(rotated).current()
    running = Device.open(rotated, threads=1)
    damage_keys(rotated)
    device = running if opened == "before it" else Device.open(rotated, threads=1)
    status = device.apply(orders.rotation)
    assert (status.kind, status.task, status.trust_version, status.damage) == (
        "trust",
        2,
        2,
        (),
    )
    assert Store(rotated).current() == record
    assert Device.verify(rotated).intact
    assert (
        device_life.digest(device)
        == device_life.digest(Device.open(rotated, threads=1))
        == device_life.logits[2]
    )
    with pytest.raises(TrustError, match="signature refused"):
        device.apply(device_life.fleet.packets[2])
    assert device.apply(orders.renewed[2]).task == 3


def test_keys_and_the_packet_they_signed_are_repaired_in_either_order(
    device_life: Fixture, rotated: Path
) -> None:
    orders = device_life.orders
    for order in ([orders.rotation, orders.renewed[1]], [orders.renewed[1], orders.rotation]):
        damage_keys(rotated)
        damage_newest(rotated)
        for path in order:
            device = Device.open(rotated, threads=1)
            assert device_life.digest(device) == device_life.logits[1]
            if (
                path == order[0] == orders.renewed[1]
            ):  # its bytes are kept, but who signed them is not known yet
                with pytest.raises(TrustError, match="repaired"):
                    device.apply(path)
            else:
                device.apply(path)
        assert (device.status().task, device.status().damage) == (2, ())
        assert device_life.digest(Device.open(rotated, threads=1)) == device_life.logits[2]


def test_a_device_with_damaged_keys_can_go_back_and_stays_closed(
    device_life: Fixture, fleet: Fleet, store: Path
) -> None:
    device = Device.open(store, threads=1)
    for path in (*fleet.packets[:2], device_life.orders.rotation):
        device.apply(path)
    damage_keys(store)
    device = Device.open(store, threads=1)
    assert device_life.digest(device) == device_life.logits[2]  # nothing but the keys is lost
    for task in (1, 0):
        status = device.rollback()
        assert (status.task, status.trust_version) == (task, 0)
        assert status.damage
        assert (
            device_life.digest(device)
            == device_life.digest(Device.open(store, threads=1))
            == device_life.logits[task]
        )
    with pytest.raises(TrustError):
        device.apply(fleet.packets[0], allow_older=True)
    device.apply(device_life.orders.rotation)
    assert device.apply(device_life.orders.renewed[0], allow_older=True).damage == ()


def test_a_rotation_on_a_device_with_a_damaged_packet_and_a_damaged_record(
    device_life: Fixture, fleet: Fleet, store: Path
) -> None:
    """Other keys come through, and the damaged packet, signed by the old ones, can still be repaired by its own bytes."""
    device = Device.open(store, threads=1)
    for path in fleet.packets[:2]:
        device.apply(path)
    damage_newest(store)
    flip(store / "generation.0.json", 20)
    device = Device.open(store, threads=1)
    assert len(device.status().damage) == 2
    status = device.apply(device_life.orders.rotation)
    for one in (device, Device.open(store, threads=1)):
        status = one.status()
        assert (status.task, status.highest_task, status.trust_version) == (1, 2, 2)
        assert len(status.damage) == 1  # the record is written anew
        assert device_life.digest(one) == device_life.logits[1]
    with pytest.raises((InputError, TrustError)):
        device.apply(store / "packets" / Store(store).current().packets[-1])
    assert device.apply(fleet.packets[1]).damage == ()
    assert (
        device_life.digest(device)
        == device_life.digest(Device.open(store, threads=1))
        == device_life.logits[2]
    )
    assert device.apply(device_life.orders.renewed[2]).task == 3


@pytest.mark.parametrize("name", ["generation.0.json", "generation.1.json"])
def test_either_record_may_be_lost_after_a_rotation(
    device_life: Fixture, fleet: Fleet, store: Path, name: str
) -> None:
    """Retired keys stay retired, and what was revoked stays revoked."""
    device = Device.open(store, threads=1)
    for path in (*fleet.packets[:2], device_life.orders.revocation, device_life.orders.rotation):
        device.apply(path)
    flip(store / name, 20)
    device = Device.open(store, threads=1)
    status = device.status()
    assert (status.trust_version, status.revoked, len(status.damage)) == (2, ((2, 0),), 1)
    assert device_life.digest(device) == device_life.logits[1]
    before = snapshot(store)
    for path in (fleet.packets[1], device_life.orders.renewed[1]):
        with pytest.raises(TrustError, match=r"signature refused|was revoked"):
            device.apply(path, allow_older=True)
    assert snapshot(store) == before


def test_keys_damaged_in_a_running_program_that_goes_back(
    device_life: Fixture, rotated: Path
) -> None:
    """It rolls back, reads its keys anew, and says that they are lost; then they are repaired."""
    orders = device_life.orders
    device = Device.open(rotated, threads=1)
    damage_keys(rotated)
    with pytest.raises(TrustError):  # signed by the old keys
        device.apply(orders.revocation)
    device.rollback()
    assert device_life.digest(device) == device_life.logits[1]
    assert (device.status().trust_version, len(device.status().damage)) == (0, 1)
    assert device.apply(orders.rotation).damage == ()
    assert device.apply(orders.renewed[1], allow_older=True).task == 2
