"""What comes from outside is read without waiting, and results take the place of nothing but files."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from conftest import within

from sdlora_edge.errors import InputError, LimitError, UsageError
from sdlora_edge.storage import atomic, disk


def odd(kind: str, path: Path) -> Path:
    """Something of this kind, which is no file, under this name."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        targets = {
            "device": "/dev/zero",
            "loop": path.name,
            "dangling link": "nothing",
            "link to a pipe": "pipe",
        }
        path.symlink_to(targets[kind])
        if kind == "link to a pipe":
            os.mkfifo(path.with_name("pipe"))
    return path


@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "folder", "device", "loop", "dangling link", "link to a pipe"]
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = odd(kind, tmp_path / "x")
    for read in (
        lambda: atomic.receive(path, 100),
        lambda: atomic.read(path),
        lambda: atomic.sha256_of(path),
    ):
        with pytest.raises(InputError, match="x: "):
            within(10, read)


def test_a_file_swapped_for_a_pipe_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opening = tmp_path / "x", os.open
    path.write_bytes(b"good")

    def swapped(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return opening(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(InputError, match="not a file"):
        within(10, lambda: atomic.receive(path, 100))


def test_no_more_is_read_than_a_file_had_when_it_was_opened(tmp_path: Path) -> None:
    """The kernel's own files have no size, and some of them no end."""
    assert atomic.receive(Path("/proc/self/status"), 100) == b""
    path = tmp_path / "x"
    path.write_bytes(bytes(3))
    chunks = []
    for chunk in disk.read(path):
        chunks.append(chunk)
        with open(path, "ab") as more:
            more.write(chunk)
    assert chunks == [bytes(3)]
    (tmp_path / "link").symlink_to("x")
    assert len(atomic.receive(tmp_path / "link", 100)) == 6
    with pytest.raises(LimitError, match="6 bytes"):
        atomic.receive(path, 5)


@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "device", "loop", "dangling link", "link to a pipe"]
)
def test_nothing_but_a_file_is_replaced(tmp_path: Path, kind: str) -> None:
    """Root would rename a file over /dev/null itself."""
    path = odd(kind, tmp_path / "x")
    before = path.lstat()
    with pytest.raises(UsageError, match="is never replaced"):
        atomic.write(path, b"result")
    assert path.lstat().st_ino == before.st_ino
    assert not [name for name in os.listdir(tmp_path) if name.startswith(atomic.TEMPORARY)]
