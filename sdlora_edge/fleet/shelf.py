"""The files of the targets: each lies under its digest, and is never changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import InputError
from ..storage import atomic, disk
from .roles import TargetFile

SERVED = 0o755
"""mode of the folders that are served; their files are 0644, whatever the umask"""


class Shelf:
    """The folder `targets` of a repository."""

    def __init__(self, path: Path) -> None:
        self.folder = path / "targets"

    def place(self, target: str, digest: str) -> Path:
        """The file of a target: consistent snapshots put the digest before its name."""
        folder, _, name = target.rpartition("/")
        return self.folder / folder / f"{digest}.{name}"

    def read(self, target: str, listed: TargetFile) -> bytes:
        """The bytes of a target, compared with its digest. Raises InputError."""
        path = self.place(target, listed.hashes["sha256"])
        data = atomic.receive(path, listed.length)
        if hashlib.sha256(data).hexdigest() != listed.hashes["sha256"]:
            raise InputError(f"{path} is damaged: publish the file again, or restore it")
        return data

    def holds(self, target: str, digest: str) -> bool:
        """Whether an intact file of a target is there."""
        path = self.place(target, digest)
        return path.is_file() and atomic.sha256_of(path)[0] == digest

    def put(self, target: str, digest: str, chunks: Iterable[bytes]) -> bool:
        """Write a target's file if it is missing or damaged. Returns whether it was.

        Raises:
            InputError: The bytes have another digest: the source has changed since it was verified.
        """
        if self.holds(target, digest):
            return False
        path = self.place(target, digest)
        atomic.write(path, _verified(path, digest, chunks), like=self.folder)
        return True


def make_served(*folders: Path) -> None:
    """Make folders that a web server of another user can read, whatever the umask."""
    for folder in folders:
        try:
            atomic.make_folder(folder)
            os.chmod(folder, SERVED)
        except OSError as error:
            raise atomic.unwritten(folder, error) from error


def content(path: Path) -> Iterator[bytes]:
    """A file's bytes in chunks. Raises InputError."""
    with atomic.reading(path):
        yield from disk.read(path)


def _verified(path: Path, digest: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
        yield chunk
    if found.hexdigest() != digest:
        raise InputError(f"{path.name} changed while it was copied: publish it again")
