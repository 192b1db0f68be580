"""Signing, squashing, rotating and revoking from Python, with paths or texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Fleet
from sdlora_edge.export.issuing import (
    KeyChange,
    revoke,
    rotate_keys,
    sign_packet,
    squash_packets,
)

from sdlora_edge.device import Device
from sdlora_edge.errors import NothingToDo, UsageError
from sdlora_edge.formats import signing


def test_a_squash_is_one_packet_for_a_device(fleet: Fleet, store: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "all.sdlora")
    made = squash_packets([str(path) for path in fleet.packets], str(fleet.key), out)
    assert (made.file, made.from_task, made.to_task) == (Path(out), 0, 3)
    assert made.bytes < made.single_bytes
    assert made.to_dict()["classes"] == list(made.classes)
    assert Device.open(store).apply(out).task == 3
    with pytest.raises(UsageError, match="exists already"):
        squash_packets(fleet.packets, fleet.key, out)


def test_keys_change_and_a_second_signature_counts(fleet: Fleet, tmp_path: Path) -> None:
    private, public = signing.new_key("second", tmp_path / "keys")
    change = KeyChange(add=[str(public)], threshold=2)
    made = rotate_keys(str(fleet.bundle), fleet.key, tmp_path / "keys.sdlora", change)
    assert (made.version, made.threshold, made.complete) == (fleet.trust.version + 1, 2, False)
    assert made.signatures == {"old": (1, 1), "new": (1, 2)}
    signed = sign_packet(str(made.file), [private])
    assert (signed.file, len(signed.signed_by)) == (made.file, 2)
    with pytest.raises(NothingToDo):
        sign_packet(made.file, private)
    with pytest.raises(NothingToDo, match="in force already"):
        rotate_keys(fleet.bundle, fleet.key, tmp_path / "same.sdlora", KeyChange())


def test_a_revocation_takes_a_device_back(fleet: Fleet, store: Path, tmp_path: Path) -> None:
    device = Device.open(store)
    for path in fleet.packets:
        device.apply(path)
    made = revoke(str(fleet.bundle), 2, 0, str(fleet.key), str(tmp_path / "revocation.sdlora"))
    assert (made.signatures, made.threshold) == (1, 1)
    assert device.apply(made.file).task == 1
