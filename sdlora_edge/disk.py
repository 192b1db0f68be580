"""What is asked of the operating system: ten operations, and a store's files are touched by no others.

Whether a device survives a power cut is decided by their order, for a disk promises no more than this:

    write                          when it returns, the file's bytes survive, but not yet its name
    sync                           every name made, changed or removed in a folder survives, or the bytes of a file
    mkdir, rename, unlink, rmdir   every process sees them at once; they survive when the folder is synced
    read, size, names, lock        ask, and change nothing that matters

Until then a disk may hold any part of the bytes, and any of the names, in any mixture. Call them through the module
(`disk.rename`): tests/faults puts others in their place that count, fail, or work out every state a cut can leave. They
raise OSError; `files` makes typed errors of it. (ONNX Runtime and safetensors open a bundle's files by their path, after each
has been read here and compared with its digest.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UsageError
from .platforms import cannot_import

try:
    import fcntl
except ImportError as error:
    raise UsageError(cannot_import(error)) from error

CHUNK = 1 << 20
"""bytes that `read` holds at a time"""


def read(path: Path) -> Iterator[bytes]:
    """A file's bytes, in chunks."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def size(path: Path) -> int | None:
    """Bytes of what has this name, a link not followed; None where nothing has it."""
    try:
        return os.lstat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def names(folder: Path) -> dict[str, bool]:
    """The names in a folder, sorted, and whether each is a folder itself."""
    with os.scandir(folder) as found:
        return {entry.name: entry.is_dir(follow_symlinks=False) for entry in sorted(found, key=lambda e: e.name)}


def write(path: Path, chunks: Iterable[bytes], mode: int = 0o644) -> None:
    """A new file, its bytes synced; never through a link, or with the permissions of, something that lies there.

    Synced through the descriptor it was written by: a write that failed later is reported to that one for certain.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the names in a folder, or the bytes of a file that others wrote, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name, in one step, in place of the file that had it."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove the name of a file, or a link."""
    os.unlink(path)


def mkdir(path: Path) -> None:
    os.mkdir(path)


def rmdir(path: Path) -> None:
    os.rmdir(path)


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock, on a file that is made where it is missing; the operating system frees that of a process that dies.

    Raises BlockingIOError where another one holds it, unless it is to `wait`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
