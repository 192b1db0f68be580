"""Who a device is: made once, changed by a person, never half there."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from conftest import Fleet

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, StorageError, UsageError
from sdlora_edge.fleet.identity import Changes, configure, device_signer, identity
from sdlora_edge.storage import disk


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """As much of a store as an identity needs."""
    store = tmp_path / "store"
    (store / "bundle").mkdir(parents=True)
    return store


def test_a_store_has_no_identity_until_it_is_configured(bare: Path) -> None:
    with pytest.raises(InputError, match="sdlora-edge device configure"):
        identity(bare)
    with pytest.raises(InputError, match="not a store"):
        configure(bare / "none", Changes())
    made = configure(bare, Changes(name="gate 3", channel="line-3", groups=("canary",)))
    assert made == identity(bare)
    assert (made.name, made.channel, made.groups) == ("gate 3", "line-3", ("canary",))
    changed = configure(bare, Changes(url="https://updates.example/fleet"))
    assert (changed.id, changed.public, changed.name) == (made.id, made.public, "gate 3")
    assert stat.S_IMODE((bare / "fleet" / "key").stat().st_mode) == 0o600
    assert device_signer(bare).public_key.keyval["public"] == made.public


@pytest.mark.parametrize(
    "changes",
    [
        Changes(name="x" * 201),
        Changes(channel=""),
        Changes(channel="a/b"),
        Changes(channel="#"),
        Changes(channel="x" * 65),
        Changes(groups=("a", "a")),
        Changes(groups=("",)),
        Changes(groups=tuple(map(str, range(21)))),
        Changes(url="ftp://updates.example"),
        Changes(url="https://"),
        Changes(url="https://updates.example:99999"),
        Changes(report_to=("mqtt://camera:secret@broker.example",)),
        Changes(report_to=("amqp://broker.example",)),
        Changes(report_to=("",) * 9),
    ],
    ids=str,
)
def test_an_identity_that_is_not_valid_is_refused(bare: Path, changes: Changes) -> None:
    with pytest.raises(UsageError) as caught:
        configure(bare, changes)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="no identity"):
        identity(bare)


def test_a_path_for_reports_is_kept_absolute(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bare.parent)
    assert configure(bare, Changes(report_to=("out.json",))).report_to == (
        str(bare.parent / "out.json"),
    )


def test_a_damaged_identity_or_another_key_is_named(bare: Path) -> None:
    configure(bare, Changes())
    key = (bare / "fleet" / "key").read_bytes()
    other = bare.parent / "other"
    (other / "bundle").mkdir(parents=True)
    configure(other, Changes())
    (bare / "fleet" / "key").write_bytes((other / "fleet" / "key").read_bytes())
    with pytest.raises(InputError, match="is not the key"):
        device_signer(bare)
    (bare / "fleet" / "key").write_bytes(key)
    (bare / "fleet" / "device.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"device\.json is damaged.*remove it"):
        identity(bare)


def test_a_failing_disk_leaves_no_identity_without_its_key(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = disk.rename

    def refuse(source: Path, target: Path) -> None:
        if target.name == "device.json":
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", refuse)
        with pytest.raises(StorageError, match=r"device\.json cannot be written"):
            configure(bare, Changes())
    key = (bare / "fleet" / "key").read_bytes()
    with pytest.raises(InputError, match="no identity"):
        identity(bare)
    configure(bare, Changes())
    assert (bare / "fleet" / "key").read_bytes() == key  # the first one serves


def test_a_store_with_an_identity_is_intact(fleet: Fleet, store: Path) -> None:
    configure(store, Changes())
    assert Device.verify(store).intact
    assert not Device.verify(store).leftovers
    Device.open(store, threads=1).apply(fleet.packets[0])
    assert identity(store).id
    assert Device.open(store, threads=1).status().task == 1
