"""What lies in the watched folder: files, and the digests of those that can be packets.

A file counts once two looks in a row find it unchanged. From then on only its bytes count, not its
name or its time. Each file is read once for each state it is in. Nothing in the folder is changed.
"""

from __future__ import annotations

import os
import stat
from itertools import islice
from pathlib import Path

from ...errors import InputError, LimitError, ResourceError
from ...formats.canonical import sha256
from ...formats.container import opened
from ...formats.packet import LIMITS, SUFFIX
from ...storage import atomic, disk
from .journal import Journal

Stamp = tuple[int, int, int, int]
"""inode, size, and times of change of bytes and of attributes: the same stamp, the same bytes"""


class Scan:
    """The packets in one folder. What cannot be read goes into the journal."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self._journal = journal
        # kept from look to look: making a hundred thousand new paths comparable takes a second
        self._paths: dict[str, Path] = {}
        # None: something is there that is not a file
        self._stamps: dict[Path, Stamp | None] = {}
        self._before: dict[Path, Stamp | None] = {}
        self._digests: dict[Path, tuple[Stamp, str]] = {}

    def look(self) -> None:
        """Take the stamp of every file, and forget the files that are gone."""
        self._before, self._stamps = self._stamps, self._stamps_now()
        self._digests = {path: d for path, d in self._digests.items() if path in self._stamps}
        self._journal.keep(self._stamps)

    def steady(self, settled: bool) -> list[Path]:
        """The files to read now. settled: only those that have not changed since the look before.

        Files that could not be read come last, so that they delay no other file.
        """
        steady = [
            path
            for path, stamp in self._stamps.items()
            if stamp and (not settled or self._before.get(path) == stamp)
        ]
        return sorted(steady, key=self._journal.troubled)

    @property
    def files(self) -> int:
        """How many files lie in the folder."""
        return sum(stamp is not None for stamp in self._stamps.values())

    @property
    def digests(self) -> set[str]:
        """Of all files in the folder that were read."""
        return {digest for _, digest in self._digests.values()}

    def digest(self, path: Path) -> str | None:
        """SHA-256 of a file; None if it cannot be read now, or cannot be a packet."""
        if (stamp := self._stamps[path]) is None:
            return None
        if path not in self._digests or self._digests[path][0] != stamp:
            digest = ""
            try:
                if stamp[1] > LIMITS.packet or self._has_header(path):
                    digest = sha256(atomic.receive(path, LIMITS.packet))
                self._journal.forget(path)
            except LimitError as error:
                self._journal.refused("refused", path, error)
            except (InputError, MemoryError, ResourceError) as error:
                self._journal.trouble("unreadable", error, path)
                return None  # not remembered: each look tries again
            self._digests[path] = stamp, digest
        return self._digests[path][1] or None

    def still(self, path: Path, digest: str) -> bytes | None:
        """The file's bytes; None if it has changed, or is gone with the USB stick it was on.

        Then the next look reads it again.
        """
        try:
            data = atomic.receive(path, LIMITS.packet)
        except (InputError, MemoryError, ResourceError):
            data = b""
        if sha256(data) == digest:
            return data
        self._digests.pop(path, None)
        return None

    def _stamps_now(self) -> dict[Path, Stamp | None]:
        """None of a folder that is missing, as a USB stick's folder often is."""
        names = []
        try:
            with os.scandir(self.folder) as entries:
                found = (entry.name for entry in entries)
                names = sorted(n for n in found if n.endswith(SUFFIX) and not n.startswith("."))
            self._journal.recovered("folder")
        except OSError as error:
            problem = InputError(f"{self.folder}: {error.strerror or error}")
            self._journal.trouble("folder", problem)
        self._paths = {name: self._paths.get(name) or self.folder / name for name in names}
        return {path: self._stamp(path) for path in self._paths.values()}

    def _stamp(self, path: Path) -> Stamp | None:
        """None for anything but a file, which is told once: one bad link hides no other file."""
        try:
            s = path.stat()
            if stat.S_ISREG(s.st_mode):
                return s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
            problem = "not a file: remove it"
        except OSError as error:
            problem = error.strerror or str(error)
        if os.path.lexists(path):  # else it was removed meanwhile
            self._journal.trouble("unreadable", InputError(f"{path}: {problem}"), path)
        return None

    def _has_header(self, path: Path) -> bool:
        """A file without one is not a packet, and is not read any further, however large it is."""
        with atomic.reading(path):
            begin = b"".join(islice(disk.read(path), 1 + -(-LIMITS.header // disk.CHUNK)))
        try:
            opened(begin)
        except InputError as error:
            self._journal.refused("refused", path, error)
            return False
        return True
