"""A program that has been running while another one worked on a damaged store: it takes over what is in force now, by its next look."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Fleet
from faults.scenarios import Fixture, damage_keys, damage_newest

from sdlora_edge.device import Device
from sdlora_edge.device.device import DOUBLE_BUFFER, IN_PLACE
from sdlora_edge.device.engines.onnx_runtime import OnnxEngine
from sdlora_edge.device.store import Store
from sdlora_edge.errors import NotForThisDevice


@pytest.mark.parametrize("then", ["rollback", "revocation"])
def test_a_lost_record_whose_number_is_given_again(
    device_life: Fixture, fleet: Fleet, store: Path, then: str
) -> None:
    running = Device.open(store, threads=1)
    running.apply(fleet.packets[0])
    lost = {path: path.read_bytes() for path in store.glob("generation.*")}
    running.apply(fleet.packets[1])
    for path, older in lost.items():
        path.write_bytes(older)
    other = Device.open(store, threads=1)
    status = other.rollback() if then == "rollback" else other.apply(device_life.orders.revocation)
    assert (
        status.generation == running.status().generation == 3
    )  # another generation of the same number
    assert running.refresh()
    assert not running.refresh()
    assert running.status().task == status.task < 2
    assert device_life.digest(running) == device_life.logits[status.task]
    with pytest.raises(NotForThisDevice):
        running.apply(fleet.packets[2])
    assert device_life.digest(Device.open(store, threads=1)) == device_life.logits[status.task]


@pytest.mark.parametrize("looks", [True, False])
def test_what_another_program_has_repaired(
    device_life: Fixture, fleet: Fleet, store: Path, looks: bool
) -> None:
    """The record is what it was: the damage is what has gone."""
    orders, device = device_life.orders, Device.open(store, threads=1)
    for path in (fleet.packets[0], orders.rotation, orders.renewed[1]):
        device.apply(path)
    for damage, whole in ((damage_keys, orders.rotation), (damage_newest, orders.renewed[1])):
        damage(store)
        running = Device.open(store, threads=1)
        before = running._live
        assert not running.refresh()
        assert running._live is before  # nothing is built where nothing has changed
        Device.open(store, threads=1).apply(whole)
        if looks:
            assert running.refresh()
            assert (
                running.status().task,
                running.status().trust_version,
                running.status().damage,
            ) == (2, 2, ())
            assert device_life.digest(running) == device_life.logits[2]
    assert running.apply(orders.renewed[2]).damage == ()


@pytest.mark.parametrize("swap", [DOUBLE_BUFFER, IN_PLACE])
def test_a_running_program_goes_back_to_what_is_left_of_packets_damaged_meanwhile(
    device_life: Fixture, fleet: Fleet, store: Path, swap: str
) -> None:
    """As `device rollback` does, which reads them anew: not to a packet that nobody can read any more."""
    running = Device.open(store, threads=1, swap=swap)
    for path in fleet.packets:
        running.apply(path)
    (store / "packets" / Store(store).current().packets[1]).unlink()
    assert device_life.digest(running) == device_life.logits[3]
    status = running.rollback()
    assert (status.task, status.damage) == (1, ())
    assert status == Device.open(store, threads=1).status()
    assert device_life.digest(running) == device_life.logits[1]
    assert running.apply(fleet.packets[1], allow_older=True).task == 2


def test_a_running_program_goes_back_to_what_is_left_where_keys_were_damaged_meanwhile(
    device_life: Fixture, store: Path
) -> None:
    running, orders = Device.open(store, threads=1), device_life.orders
    for path in (orders.rotation, *orders.renewed):
        running.apply(path)
    damage_keys(store)
    status = running.rollback()
    assert (status.task, status.trust_version) == (0, 0)
    assert status == Device.open(store, threads=1).status()
    assert running.apply(orders.rotation).damage == ()
    assert running.apply(orders.renewed[0], allow_older=True).task == 1


def test_a_beginning_is_not_published_over_what_was_repaired_meanwhile(
    fleet: Fleet, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[int] = []
    monkeypatch.setattr(
        OnnxEngine, "publish", lambda self, loaded, state: published.append(loaded.classes)
    )
    device = Device.open(store, threads=1)
    for path in fleet.packets[:2]:
        device.apply(path)
    damage_newest(store)
    publish = Device._publish

    def slowly(self: Device, wait: float = 0.0) -> None:
        monkeypatch.setattr(Device, "_publish", publish)
        Device.open(store, threads=1).apply(fleet.packets[1])
        publish(self)

    monkeypatch.setattr(Device, "_publish", slowly)
    Device.open(store, threads=1)
    assert len(Store(store).current().packets) == 2
    assert published[-1] == len(device.status().classes)


def test_what_a_device_with_damaged_keys_goes_back_to_is_published(
    device_life: Fixture, fleet: Fleet, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[int] = []
    monkeypatch.setattr(
        OnnxEngine, "publish", lambda self, loaded, state: published.append(loaded.classes)
    )
    device = Device.open(store, threads=1)
    for path in (*fleet.packets[:2], device_life.orders.rotation):
        device.apply(path)
    damage_keys(store)
    status = Device.open(store, threads=1).rollback()
    assert published[-1] == len(status.classes)
