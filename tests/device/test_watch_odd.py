"""A watcher goes on among odd files and with a failing log, and stops whenever it is asked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import Fleet, Result, within

from sdlora_edge.device import Device
from sdlora_edge.device.watch import service as watch
from sdlora_edge.device.watch.events import AT_ONCE, Events, notify, to_stderr
from sdlora_edge.device.watch.journal import WatchReport
from sdlora_edge.device.watch.scan import Scan
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import ResourceError, UsageError
from sdlora_edge.formats.packet import LIMITS
from sdlora_edge.storage import atomic, disk

Cli = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def looked(watcher: Watcher) -> WatchReport:
    return within(60, lambda: watcher.look(settled=False))


ODD: dict[str, Callable[[Path], object]] = {
    "kernel log": lambda path: path.symlink_to("/proc/kmsg"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_told_once_and_hides_nothing(
    fleet: Fleet, store: Path, folder: Path, kind: str
) -> None:
    ODD[kind](folder / "a.sdlora")
    shutil.copy(fleet.packets[0], folder / "z.sdlora")
    events: list[tuple[str, dict[str, Any]]] = []
    watcher = Watcher(folder, store, emit=lambda *event: events.append(event), threads=1)
    assert looked(watcher).device.task == 1
    looked(watcher)
    odd = [
        (event, fields["exit_code"])
        for event, fields in events
        if fields.get("file") == str(folder / "a.sdlora")
    ]
    assert odd in ([("unreadable", 3)], [("refused", 3)])


def test_a_file_for_which_there_is_no_memory_hides_nothing_and_is_tried_again(
    fleet: Fleet, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in zip("ab", fleet.packets, strict=False):
        shutil.copy(path, folder / f"{name}.sdlora")
    receive = atomic.receive
    watcher = Watcher(folder, store, emit=lambda event, fields: None, threads=1)
    for error in (MemoryError(), ResourceError("memory ran out")):

        def short(path: Path, limit: int, error: Exception = error) -> bytes:
            if path.name == "b.sdlora":
                raise error
            return receive(path, limit)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "receive", short)
            assert looked(watcher).device.task == 1
    assert looked(watcher).device.task == 2


def test_rubbish_is_told_up_to_a_bound_and_read_once(
    fleet: Fleet, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3 * AT_ONCE):
        (folder / f"{number}.sdlora").write_bytes(b"%d" % number)
    shutil.copy(fleet.packets[0], folder / "z.sdlora")
    read: list[str] = []
    opened = disk.opened
    monkeypatch.setattr(
        disk,
        "opened",
        lambda path: (path.parent == folder and read.append(path.name), opened(path))[1],
    )
    events: list[tuple[str, dict[str, Any]]] = []
    watcher = Watcher(folder, store, emit=lambda *event: events.append(event), threads=1)
    report = looked(watcher)
    assert (report.device.task, report.counts.refused) == (1, 3 * AT_ONCE)
    told = [event for event, _ in events]
    assert told.count("applied") == told.count("more") == 1
    assert len(told) <= AT_ONCE + 2
    (more,) = (fields for event, fields in events if event == "more")
    assert more["refused"] + told.count("refused") == 3 * AT_ONCE
    looked(watcher)
    assert len([name for name in read if name != "z.sdlora"]) == 3 * AT_ONCE


def test_of_a_large_file_that_is_no_packet_only_the_beginning_is_read(
    store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        with open(folder / f"{number}.sdlora", "wb") as sparse:
            sparse.truncate(LIMITS.packet)
    size, read = [0], disk.read

    def counted(path: Path) -> Iterator[bytes]:
        for chunk in read(path):
            size[0] += len(chunk) * (path.parent == folder)
            yield chunk

    monkeypatch.setattr(disk, "read", counted)
    watcher = Watcher(folder, store, emit=lambda event, fields: None, threads=1)
    assert looked(watcher).counts.refused == 3
    assert size[0] <= 3 * 2 * disk.CHUNK


def test_a_look_ends_in_time_and_the_next_one_goes_on(
    fleet: Fleet, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is applied meanwhile; systemd hears of each slow file; --once reads all."""
    shutil.copy(fleet.packets[0], folder / "0.sdlora")
    for number in range(1, 10):
        (folder / f"{number}.sdlora").write_bytes(b"%d" % number)
    clock, has_header, told = [0.0], Scan._has_header, list[str]()

    def slowly(self: Scan, path: Path) -> bool:
        clock[0] += watch.LOOK / 2
        return has_header(self, path)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Scan, "_has_header", slowly)
    monkeypatch.setattr(watch, "notify", told.append)
    watcher = Watcher(folder, store, emit=lambda event, fields: None, threads=1)
    watcher.look()
    refused = []
    for look in range(4):
        report = watcher.look()
        refused.append(report.counts.refused)
        assert report.device.task == 1, look
    assert refused == [2, 5, 8, 9]
    assert told.count("WATCHDOG=1") >= 10
    assert (
        Watcher(folder, store, emit=lambda event, fields: None).look(settled=False).counts.refused
        == 9
    )


def test_the_bound_on_events_holds_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more now and then: files may be changed for ever. The sum is told, too."""
    clock, told = [0.0], list[tuple[str, dict[str, Any]]]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    events = Events(lambda *event: told.append(event))
    for _ in range(24 * 3600):
        clock[0] += 1
        for _ in range(3):
            events.tell_of_file("refused", {})
        events.sum_up()
    assert len(told) < AT_ONCE + 24 * 360 + 1
    assert (
        sum(fields.get("refused", 1) for _, fields in told) + events._untold["refused"]
        == 3 * 24 * 3600
    )


def test_an_emit_that_raises_stops_nothing(fleet: Fleet, store: Path, folder: Path) -> None:
    def fails(event: str, fields: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, path in zip("ab", fleet.packets, strict=False):
        shutil.copy(path, folder / f"{name}.sdlora")
    (folder / "c.sdlora").write_bytes(b"rubbish")
    assert looked(Watcher(folder, store, emit=fails, threads=1)).counts.applied == 2


@contextlib.contextmanager
def full() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@contextlib.contextmanager
def left() -> Iterator[int]:
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """(reader, writer)."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    yield read, write
    os.close(write)
    os.close(read)


@contextlib.contextmanager
def asleep() -> Iterator[int]:
    """A pipe whose reader reads no more."""
    with full_pipe() as (_, write):
        yield write


LOGS = [full, left, asleep]


@pytest.mark.parametrize("log", LOGS)
def test_an_event_is_lost_if_stderr_takes_none(
    log: Callable[[], contextlib.AbstractContextManager[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with log() as descriptor:
        stream = open(descriptor, "w", closefd=False)  # noqa: SIM115
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            within(10, lambda: to_stderr("applied", {"file": "x" * 1000}))
        with contextlib.suppress(OSError):
            stream.close()


def test_a_long_event_is_cut_to_what_a_pipe_with_little_room_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody reads it, so a longer line would wait for good. It stays JSON."""
    with full_pipe() as (reader, descriptor), open(descriptor, "w", closefd=False) as stream:
        while not select.select([], [descriptor], [], 0)[1]:
            os.read(reader, 4096)
        monkeypatch.setattr(sys, "stderr", stream)
        within(
            10,
            lambda: to_stderr(
                "refused", {"file": "\u6587" * 500, "error": "\u4ef6" * 5000, "exit_code": 3}
            ),
        )
        monkeypatch.undo()
        told = b"".join(
            iter(
                lambda: os.read(reader, 65536) if select.select([reader], [], [], 0)[0] else b"",
                b"",
            )
        ).lstrip(b"\0")
    line = json.loads(told)
    assert len(told) <= select.PIPE_BUF
    assert (line["event"], line["exit_code"]) == ("refused", 3)
    assert line["error"].startswith("\u4ef6" * 50)


def test_an_event_is_lost_if_there_is_no_stderr(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does it go to stdout instead."""
    for stream in (None, open(os.devnull, "w")):  # noqa: SIM115
        if stream:
            stream.close()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            to_stderr("applied", {})
    assert capfd.readouterr() == ("", "")


def test_systemd_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        for address in (str(tmp_path / "notify"), "/" + "x" * 200):
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            within(10, lambda: [notify("WATCHDOG=1") for _ in range(2000)])


PROGRAM = "import sys; from sdlora_edge.cli import main; sys.exit(main(sys.argv[1:]))"


@contextlib.contextmanager
def service(
    folder: Path, store: Path, *more: str, start: str = 'exec "$@"', stderr: int | None = None
) -> Iterator[Path]:
    """A watcher in a process of its own, that ends well when it is asked to: its status file."""
    status = store.with_name("status.json")
    watch = [
        sys.executable,
        "-c",
        PROGRAM,
        "device",
        "watch",
        str(folder),
        "--store",
        str(store),
        "--status",
        str(status),
    ]
    with subprocess.Popen(["sh", "-c", start, "sh", *watch, *more], stderr=stderr) as process:
        try:
            until(status.exists)
            yield status
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert json.loads(status.read_text())["running"] is False


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("log", LOGS)
def test_a_service_whose_log_takes_nothing(
    fleet: Fleet,
    store: Path,
    folder: Path,
    log: Callable[[], contextlib.AbstractContextManager[int]],
) -> None:
    shutil.copy(fleet.packets[0], folder)
    with (
        log() as descriptor,
        service(folder, store, "--interval", "0.05", stderr=descriptor) as status,
    ):
        until(lambda: json.loads(status.read_text())["task"] == 1)
    assert Device.open(store, threads=1).status().task == 1


@pytest.mark.usefixtures("interruptible")
def test_a_service_without_a_log_ends_at_once_though_it_waits(store: Path, folder: Path) -> None:
    """No file of the store gets the number of stderr, to which libraries write."""
    with service(folder, store, "--interval", "3600", start='exec "$@" 2>&-') as status:
        assert json.loads(status.read_text())["running"] is True


def test_stop_may_come_between_any_two_lines(
    store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a signal handler: in the thread that looks and waits, whatever locks it holds."""
    monkeypatch.setattr(Watcher, "look", lambda self: {})
    monkeypatch.setattr(Watcher, "_report", lambda self: {})

    def run(number: int) -> None:
        watcher, lines = Watcher(folder, store, emit=lambda event, fields: None), 0

        def signalled(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal lines
            lines += event == "line"
            if lines == number:
                lines += 1
                watcher.stop()
            return signalled

        sys.settrace(signalled)
        watcher.run(0.01)

    for number in range(1, 60):
        within(10, lambda number=number: run(number))


@pytest.mark.parametrize("interval", ["inf", "nan", "-1", "0", "1e300"])
def test_an_interval_that_is_none_is_refused(
    cli: Cli, store: Path, folder: Path, interval: str
) -> None:
    result = cli("device", "watch", folder, "--store", store, "--interval", interval)
    assert result.code == 2, result
    assert "seconds between 0.01 and 86400" in result.err
    assert "started" not in result.err
    with pytest.raises(UsageError, match="seconds between"):
        Watcher(folder, store).run(float(interval))
