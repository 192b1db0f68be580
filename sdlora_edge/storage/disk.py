"""The twelve operations of the operating system by which a store's files are touched.

Whether a device survives a power cut is decided by their order, for a disk promises no more than
this:

    write                     when it returns, the file's bytes survive, but not yet its name
    sync                      a file's bytes survive, or all names made or removed in a folder
    mkdir, rename, link,      every process sees them at once; they survive a sync of the folder
    unlink, rmdir
    share                     the same; a cut may leave a folder that fewer people can read
    read, size, names, lock   change nothing that matters

Until then a disk may hold any part of the bytes, and any of the names, in any mixture. Call them
through the module (`disk.rename`): tests/faults puts others in their place that count, fail, or
work out every state a cut can leave. They raise OSError; `files` makes typed errors of it. (ONNX
Runtime and safetensors open a bundle's files by their path, after each has been read here and
compared with its digest.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from ..platforms import cannot_import

try:
    import fcntl
except ImportError as error:
    raise UsageError(cannot_import(error)) from error

CHUNK = 1 << 20
"""bytes that `read` holds at a time"""


def opened(path: Path) -> BinaryIO:
    """Open a regular file for reading, also through a link.

    A pipe or a device is an error at once. It is not opened, because that alone may wait or have
    effects. If one takes the file's place in between, it is not waited for either.
    """
    _require_file(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_file(os.fstat(descriptor))
        return open(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def _require_file(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a file, but a pipe, a socket or a device: name a file")


def read(path: Path) -> Iterator[bytes]:
    """A file's bytes in chunks, as many as it had when it was opened.

    A file that the kernel or another process goes on writing would have no end.
    """
    with opened(path) as file:
        left = os.fstat(file.fileno()).st_size
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def size(path: Path) -> int | None:
    """Bytes of the file or folder of this name, a link not followed; None if there is none."""
    try:
        return os.lstat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def names(folder: Path) -> dict[str, bool]:
    """The names in a folder, sorted, and whether each is a folder itself."""
    with os.scandir(folder) as found:
        return {
            entry.name: entry.is_dir(follow_symlinks=False)
            for entry in sorted(found, key=lambda e: e.name)
        }


def write(path: Path, chunks: Iterable[bytes], mode: int = 0o644, like: Path | None = None) -> None:
    """Write a new file and sync its bytes. Never follows a link, nor takes over what lies there.

    It is synced through the descriptor that wrote it: only that one is sure to hear of a write that
    fails later.

    Args:
        path: The file; nothing may have its name.
        chunks: Its bytes, in pieces.
        mode: Permissions, less the umask.
        like: A folder. Whoever may read it may read the file as far as `mode` lets them, whatever
            the umask says. If root writes, the folder's owner gets the file.
    """
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if like else mode), "wb"
    ) as file:
        if like:
            _liken(file.fileno(), like, mode)
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the names in a folder, or the bytes of a file, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder in one step. A file that had the new name is replaced."""
    os.replace(source, target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name."""
    os.link(source, target)


def unlink(path: Path) -> None:
    """Remove the name of a file, or a link."""
    os.unlink(path)


def mkdir(path: Path, mode: int = 0o777, like: Path | None = None) -> None:
    """Make a folder. like: a folder; whoever may read it may read the new one."""
    os.mkdir(path, 0o700 if like else mode)
    if like:
        _liken(path, like, 0o2755)


def share(path: Path, group: int) -> None:
    """Let a group read a folder, and what will be made in it."""
    os.chown(path, -1, group)
    os.chmod(path, 0o2750)  # noqa: S103


def _liken(made: int | Path, like: Path, most: int) -> None:
    """Give what was made the readers of a folder; if root made it, also the owner.

    A service must be able to read what an administrator wrote into its store.
    """
    found = os.stat(like)
    if os.geteuid() == 0:
        os.chown(made, found.st_uid, found.st_gid)
    os.chmod(made, 0o600 | most & (0o100 | found.st_mode))


def rmdir(path: Path) -> None:
    os.rmdir(path)


@contextlib.contextmanager
def lock(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock on a file, which is made if it is missing.

    The operating system frees the lock of a process that dies.

    wait: seconds. Raises BlockingIOError if another process holds it after that.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(descriptor)
        if (
            found.st_mode & 0o077 or found.st_uid != os.stat(path.parent).st_uid
        ):  # whoever can open it can hold it
            with contextlib.suppress(OSError):  # another user's
                _liken(descriptor, path.parent, 0o600)
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
