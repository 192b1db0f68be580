"""A packet that the device holds already is no replay."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Fleet
from faults.scenarios import Fixture

from sdlora_edge.device import Device
from sdlora_edge.errors import NothingToDo, TrustError


def test_what_a_device_holds_is_nothing_to_do_in_whatever_place(
    device_life: Fixture, fleet: Fleet, store: Path
) -> None:
    """By its bytes, by the state it leads to (as a part of a squash, too), by the bundle; until it is rolled back."""
    orders, device = device_life.orders, Device.open(store, threads=1)
    for path in (fleet.packets[0], orders.squash, orders.rotation, orders.second_rotation):
        device.apply(path)
    held = [
        *fleet.packets[:1],
        orders.squash,
        orders.rotation,
        orders.second_rotation,
        *orders.renewed,
        *orders.renewed_and_revised,
    ]
    for one in (device, Device.open(store, threads=1)):
        before = one.status()
        for path in held:
            with pytest.raises(NothingToDo, match="applied already"):
                one.apply(path)
        assert one.status() == before
    device.rollback()
    with pytest.raises(TrustError):
        device.apply(orders.squash)
    for path in orders.renewed[1:]:
        device.apply(path, allow_older=True)
