"""A disk that is full, failing or read-only: a typed error at once, the old generation serves on, and the next apply succeeds."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Fleet, Result
from faults.scenarios import Fixture
from faults.simulator import REAL

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, ResourceError, StorageError
from sdlora_edge.storage import disk

ASKING = ("read", "size", "names")
CHANGING = ("write", "sync", "rename", "unlink", "mkdir", "rmdir", "share", "lock")


class Failing:
    """The operating system refuses the n-th of some operations, counted from 1, and all after it where `for_good`."""

    def __init__(self, operations: Iterable[str], number: int, code: int, for_good: bool) -> None:
        self.operations, self.number, self.code, self.for_good, self.count = (
            operations,
            number,
            code,
            for_good,
            0,
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self.operations:
                patch.setattr(disk, name, self._failing(name))
            yield

    def _failing(self, name: str) -> Callable[..., Any]:
        def operation(path: Path, *rest: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.number or (self.for_good and self.count > self.number):
                if name == "write" and self.code == errno.ENOSPC:  # what fitted is there
                    REAL["write"](path, [b"".join(rest[0])[:100]], *rest[1:], **named)
                raise OSError(self.code, os.strerror(self.code))
            return REAL[name](path, *rest, **named)

        return operation


KINDS = {
    "full": (CHANGING, errno.ENOSPC, True),
    "full for a moment": (CHANGING, errno.ENOSPC, False),
    "failing once": (CHANGING, errno.EIO, False),
    "failing for good": (CHANGING, errno.EIO, True),
    "read-only": (CHANGING, errno.EROFS, True),
    "unreadable once": (ASKING, errno.EIO, False),
    "unreadable for good": (ASKING, errno.EIO, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_on_a_disk_that_fails(device_life: Fixture, tmp_path: Path, kind: str) -> None:
    """Each operation in turn, of an update that rolls back, sweeps and applies."""
    operations, code, for_good = KINDS[kind]
    first, second = device_life.fleet.packets[:2]
    for number in range(
        1, 200, 4 if kind == "unreadable for good" else 1
    ):  # "unreadable once" takes each in turn
        store = tmp_path / str(number)
        Device.init(device_life.fleet.bundle, store)
        device = Device.open(store, threads=1)
        device.apply(first)
        (store / "packets" / ".tmp-left").touch()
        before = device_life.digest(device)
        failing = Failing(operations, number, code, for_good)
        raised = None
        with failing.installed():
            try:
                device.apply(second)
            except (InputError, ResourceError) as error:
                raised = error
        if raised is not None:
            assert isinstance(raised, StorageError) == ("cannot be written" in str(raised))
            assert isinstance(raised, ResourceError) == (code == errno.ENOSPC)
        if failing.count < number:
            assert raised is None
            break
        again = Device.open(store, threads=1)
        assert device_life.digest(again) == device_life.digest(device)
        assert (device_life.digest(device) == before) == (
            raised is not None
        )  # it raises only where the old one stays in force
        if raised is not None:
            assert device.apply(second).task == 2
            assert not list(store.rglob(".tmp-*"))
        assert (
            device_life.digest(device)
            == device_life.digest(Device.open(store, threads=1))
            == device_life.logits[2]
        )
    else:
        pytest.fail("an update has fewer operations than this")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_flashed_on_a_disk_that_fails(
    device_life: Fixture, tmp_path: Path, kind: str
) -> None:
    operations, code, for_good = KINDS[kind]
    for number in range(1, 200, 3):
        store = tmp_path / "new" / str(number)
        failing = Failing(operations, number, code, for_good)
        with failing.installed(), contextlib.suppress(InputError, ResourceError):
            Device.init(device_life.fleet.bundle, store, group=str(os.getgid()))
        if not store.exists():
            Device.init(device_life.fleet.bundle, store)
        assert device_life.digest(Device.open(store, threads=1)) == device_life.logits[0]
        if failing.count < number:
            break


def test_the_command_says_so_in_one_line(
    cli: Callable[..., Result], fleet: Fleet, store: Path
) -> None:
    with Failing(CHANGING, 1, errno.EROFS, True).installed():
        result = cli("device", "apply", fleet.packets[0], "--store", store)
        assert (result.code, result.out) == (3, "")
        (line,) = [line for line in result.err.splitlines() if not line.startswith("WARNING")]
        assert "Read-only file system" in line
        assert cli("device", "status", "--store", store).code == 0
    assert cli("device", "apply", fleet.packets[0], "--store", store).code == 0


def test_opening_serves_what_can_be_read(device_life: Fixture, tmp_path: Path) -> None:
    """A packet that the disk does not give: the generation before it. A record or a bundle: an error that names it."""
    store = tmp_path / "store"
    Device.init(device_life.fleet.bundle, store)
    Device.open(store, threads=1).apply(device_life.fleet.packets[0])

    @contextlib.contextmanager
    def unreadable(part: str) -> Iterator[None]:
        def read(path: Path) -> Iterator[bytes]:
            if part in str(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return REAL["read"](path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "read", read)
            yield

    with unreadable("packets/"):
        device = Device.open(store, threads=1)
        assert device_life.digest(device) == device_life.logits[0]
        assert "Input/output error" in device.status().damage[0]
    for part in ("generation.0.json", "weights.safetensors"):
        with unreadable(part), pytest.raises(InputError, match=part):
            Device.open(store, threads=1)
    assert device_life.digest(Device.open(store, threads=1)) == device_life.logits[1]
