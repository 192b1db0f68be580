"""Writes files and folders so that a power cut leaves the old one or the new one.

Runs, bundles and stores are written with this.

The rule, for a file and for a folder: fill it under a temporary name, sync all of it, rename it,
sync the folder it lies in.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import InputError, LimitError, SdloraError, StorageError, UsageError
from ..shortage import shortage
from . import disk

TEMPORARY = ".tmp-"
"""Prefix of the name of a file or folder that is not complete yet."""


def read(path: Path, limit: int | None = None) -> bytes:
    """The file's bytes.

    Raises:
        InputError: It cannot be read.
        LimitError: It holds more than `limit` bytes.
    """
    found, size = [], 0
    for chunk in _chunks(path):
        found.append(chunk)
        size += len(chunk)
        if limit is not None and size > limit:
            raise LimitError(f"{path} is larger than the {limit} bytes allowed here")
    return b"".join(found)


def receive(path: Path, limit: int) -> bytes:
    """The bytes of a file from outside. A file that is too large is not read at all.

    Raises:
        InputError: It cannot be read.
        LimitError: It holds more than `limit` bytes.
    """
    with reading(path):
        found = path.stat()
    if stat.S_ISREG(found.st_mode) and found.st_size > limit:
        raise LimitError(f"{path} has {found.st_size} bytes, more than the {limit} allowed here")
    return read(path, limit)


def refuse_links(*folders: Path) -> None:
    """Raises InputError if a folder holds a link or a device.

    A link leads to files elsewhere, which are not ours to read or write.
    """
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                odd = [
                    e
                    for e in entries
                    if not (e.is_file(follow_symlinks=False) or e.is_dir(follow_symlinks=False))
                ]
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror or error}") from error
        if found := [e.path for e in odd if os.path.lexists(e.path)]:
            raise InputError(
                f"{found[0]} is a link or a device, which a store never holds: "
                "remove it, put the file itself there, or flash the device again"
            )


def sha256_of(path: Path) -> tuple[str, int]:
    """(hexadecimal SHA-256, size in bytes) of a file, read in chunks. Raises InputError."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _chunks(path: Path) -> Iterator[bytes]:
    with reading(path):
        yield from disk.read(path)


def temporary() -> Path:
    """The folder for temporary files. Raises StorageError if there is none."""
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise StorageError(
            "there is no folder for temporary files: set TMPDIR to one that can be written"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the operating system about an unreadable file or folder into InputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        unread = InputError(f"{path}: {getattr(error, 'strerror', None) or error}")
        raise (shortage(error, f"while {path} was read") or unread) from error


def require_replaceable(path: Path) -> None:
    """Raises UsageError for a link, a pipe or a device.

    A file that is renamed over /dev/null would replace it for the whole machine.
    """
    if (
        os.path.lexists(path)
        and not stat.S_ISREG(mode := path.lstat().st_mode)
        and not stat.S_ISDIR(mode)
    ):
        raise UsageError(
            f"{path} is a link, a pipe or a device, which is never replaced: name a file"
        )


def unwritten(path: Path, error: OSError | MemoryError) -> SdloraError:
    """The error to raise for a file or folder that cannot be written."""
    said = getattr(error, "strerror", None) or error
    return shortage(error, f"while {path} was written") or StorageError(
        f"{path} cannot be written: {said}"
    )


def write(
    path: Path, data: bytes | Iterable[bytes], mode: int = 0o644, like: Path | None = None
) -> None:
    """Write a file, or replace it. After an error or a power cut it is the old one or the new one.

    Args:
        path: The file.
        data: Its bytes, or pieces of them, one of which is held at a time. If making a piece
            raises, the old file stays.
        mode: Permissions, less the umask.
        like: A folder. Whoever may read it may read the file as far as `mode` lets them, whatever
            the umask says. If root writes, the folder's owner gets the file.

    Raises:
        StorageError: The file cannot be written.
        ResourceError: The disk is full.
        UsageError: `path` is a link, a pipe or a device.
    """
    place(path, data, mode, like)
    try:
        disk.sync(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error


def place(
    path: Path, data: bytes | Iterable[bytes], mode: int = 0o644, like: Path | None = None
) -> None:
    """As `write`, but a power cut may undo it until the caller syncs the folder.

    For many files in one folder, which one sync then keeps. The file never holds half of its bytes.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        require_replaceable(path)
        if disk.size(path.parent) is None:
            make_folder(path.parent, like)
        if disk.size(temporary) is not None:  # a killed process left it
            disk.unlink(temporary)
        disk.write(temporary, [data] if isinstance(data, bytes) else data, mode, like)
        disk.rename(temporary, path)
    except (OSError, MemoryError, SdloraError) as error:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        if isinstance(error, SdloraError):
            raise
        raise unwritten(path, error) from error


def make_folder(path: Path, like: Path | None = None) -> None:
    """Make a folder and its missing parents, durably. Raises OSError."""
    if disk.size(path) is None:
        make_folder(path.parent, like)
        with contextlib.suppress(FileExistsError):  # another process was faster
            disk.mkdir(path, like=like)
    keep_name(path)


def keep_name(path: Path) -> None:
    """Make a folder's name durable: a killed process may have made it without syncing it.

    Raises OSError.
    """
    # A folder that we may not read is not one that we make folders in.
    with contextlib.suppress(PermissionError):
        disk.sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """Fill a folder under a temporary name, and rename it once it is complete.

    The next call removes what a killed process left under the temporary name.

    Raises:
        UsageError: `path` exists.
        StorageError: It cannot be written.
        ResourceError: The disk is full.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        if disk.size(path) is not None:
            raise UsageError(f"{path} exists already: choose another name, or remove it first")
        make_folder(path.parent)
        remove(temporary)
        disk.mkdir(temporary, mode)
        yield temporary
        _sync_all(temporary)
        disk.rename(temporary, path)
        disk.sync(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


def copy(source: Path, target: Path) -> None:
    """Write a new file with the bytes of another. Its bytes are synced, its name is not.

    Raises:
        InputError: The source cannot be read.
        OSError: The target cannot be written.
    """
    disk.write(target, _chunks(source), like=target.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder and all in it; nothing if it is missing.

    Raises OSError.
    """
    is_folder = disk.names(path.parent).get(path.name)
    if is_folder:
        for name in disk.names(path):
            remove(path / name)
        disk.rmdir(path)
    elif is_folder is not None:
        disk.unlink(path)


def _sync_all(folder: Path) -> None:
    for name, is_folder in disk.names(folder).items():
        _sync_all(folder / name) if is_folder else disk.sync(folder / name)
    disk.sync(folder)
