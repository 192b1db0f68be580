"""Who may read a store, write it and hold its locks: never a matter of the umask.

Who only reads takes no lock and writes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Fleet, Result, make_images
from faults.test_errors import CHANGING, Failing

from sdlora_edge.device import Device
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import UsageError

Cli = Callable[..., Result]


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(store: Path) -> dict[str, set[int]]:
    """The permissions of folders, locks and other files."""
    found: dict[str, set[int]] = {"folders": set(), "locks": set(), "files": set()}
    for path in (store, *store.rglob("*")):
        kind = "folders" if path.is_dir() else "locks" if path.suffix == ".lock" else "files"
        found[kind].add(stat.S_IMODE(path.stat().st_mode))
    return found


def use(fleet: Fleet, store: Path, folder: Path) -> None:
    """Everything that writes into a store."""
    device = Device.open(store, threads=1)
    device.apply(fleet.packets[0])
    device.rollback()
    folder.mkdir()
    (folder / "1.sdlora").write_bytes(fleet.packets[0].read_bytes())
    Watcher(folder, store, emit=lambda *_: None, threads=1).look(settled=False)


@pytest.mark.parametrize("mask", [0o000, 0o027, 0o077])
@pytest.mark.parametrize("group", [None, str(os.getgid())])
def test_a_store_is_its_owners_or_readable_by_a_group(
    fleet: Fleet, tmp_path: Path, mask: int, group: str | None
) -> None:
    store = tmp_path / "store"
    with umask(mask):
        Device.init(fleet.bundle, store, group=group)
        use(fleet, store, tmp_path / "folder")
    folders, others = (0o700, 0o600) if group is None else (0o2750, 0o640)
    assert modes(store) == {"folders": {folders}, "files": {others}, "locks": {0o600}}
    assert (store / "watch.json").exists()


def test_a_group_that_is_not_there(cli: Cli, fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no group 'nobody-knows'"):
        Device.init(fleet.bundle, tmp_path / "store", group="nobody-knows")
    for name in ("nobody-knows", str(2**32 - 1), "9" * 5000):
        assert (
            cli(
                "device",
                "init",
                "--bundle",
                fleet.bundle,
                "--store",
                tmp_path / "store",
                "--group",
                name,
            ).code
            == 2
        )
    assert not list(tmp_path.glob("*store*"))


def test_a_store_of_an_older_version_goes_on_as_it_was(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    """Readable by everyone: but its locks are not theirs to hold any more."""
    for path in (store, *store.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for name in ("apply.lock", "publish.lock"):
        (store / name).touch(0o644)
        (store / name).chmod(0o644)
    use(fleet, store, tmp_path / "folder")
    found = modes(store)
    assert (found["folders"], found["files"]) == ({0o755}, {0o644})
    assert stat.S_IMODE((store / "apply.lock").stat().st_mode) == 0o600


def test_what_root_writes_belongs_to_the_owner_of_the_store(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for path in (store, *store.rglob("*")):
        os.chown(path, 65534, 65534)
    use(fleet, store, tmp_path / "folder")
    assert {(path.stat().st_uid, path.stat().st_gid) for path in store.rglob("*")} == {
        (65534, 65534)
    }


def test_readers_need_no_lock(cli: Cli, fleet: Fleet, store: Path, tmp_path: Path) -> None:
    (image,) = make_images(tmp_path / "images", ["a"], 1).rglob("*.png")
    Device.open(store, threads=1).apply(fleet.packets[0])
    for name in ("apply.lock", "publish.lock"):
        (store / name).touch()
    hold = [
        "flock",
        "-x",
        str(store / "apply.lock"),
        "flock",
        "-x",
        str(store / "publish.lock"),
        "sh",
        "-c",
        "echo held; read line",
    ]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        for command in (("status",), ("verify",), ("predict", image)):
            assert cli("device", *command, "--store", store).code == 0
        assert cli("device", "apply", fleet.packets[1], "--store", store).code == 2
        other.stdin.close()


def test_a_store_that_cannot_be_written_is_read(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    (image,) = make_images(tmp_path / "images", ["a"], 1).rglob("*.png")
    Device.open(store, threads=1).apply(fleet.packets[0])
    disk = Failing(CHANGING, 1, errno.EROFS, True)
    with disk.installed():
        for command in (("status",), ("verify",), ("predict", image)):
            result = cli("device", *command, "--store", store)
            assert (result.code, result.err) == (0, "")
    assert disk.count == 0  # nothing was asked of it
