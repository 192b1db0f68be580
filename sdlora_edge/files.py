"""The file operations of runs, bundles and stores: whole files, written so that a power cut leaves the old or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, LimitError, StorageError, UsageError

TEMPORARY = ".tmp-"
"""how the name of a file begins that is not whole yet"""


def read(path: Path, limit: int | None = None) -> bytes:
    """The file's bytes. Raises InputError where it cannot be read, LimitError where it holds more than `limit` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if limit is not None and len(data) > limit:
        raise LimitError(f"{path} is larger than the {limit} bytes allowed here")
    return data


def sha256_of(path: Path) -> tuple[str, int]:
    """(hexadecimal SHA-256, size in bytes) of a file, read in chunks. Raises InputError."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return digest.hexdigest(), size


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a whole file: temporary name, fsync, rename, fsync of the folder. Raises StorageError."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        # a fresh file of ours: never through a link, or with the permissions of, something that lay there
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name and rename it once it is whole.

    Raises UsageError where `path` exists, StorageError where it cannot be written.

    What a killed process left under the temporary name is removed by the next call.
    """
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists already: choose another name, or remove it first")
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(folder, name), "rb+") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
