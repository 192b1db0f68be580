"""Partial downloads in the store: they survive a power cut, and go on where they ended.

    fleet/incoming/<digest>.<offset>    a piece, complete
    fleet/incoming/<digest>             all of it, verified

Pieces are written as every file of a store, so no operation of the disk is needed that the rest
does not need. Nothing here is trusted before its digest was compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, ResourceError, TrustError
from ..formats.canonical import is_sha256
from ..storage import atomic, disk

PIECE = 1024 * 1024
MARGIN = 16 * 1024 * 1024
"""bytes of the disk that stay free"""
Stream = Callable[[int], Generator[bytes, None, None]]
"""Called with an offset: the bytes from there on."""


@dataclass(frozen=True)
class Wanted:
    """A file to download. digest: SHA-256. size: bytes."""

    digest: str
    size: int
    stream: Stream


class Incoming:
    """The folder of downloads. like: whoever may read this folder may read them."""

    def __init__(self, folder: Path, like: Path) -> None:
        self.folder, self._like = folder, like

    def path(self, digest: str) -> Path:
        """Where a complete file lies."""
        return self.folder / digest

    def fetch(self, wanted: Wanted) -> Path:
        """Download a file, or what is missing of it.

        Raises:
            TrustError: It has another digest, twice.
            ResourceError: The disk has no room for it.
        """
        target = self.path(wanted.digest)
        if self._is_complete(wanted):
            return target
        for _ in range(2):  # a piece may be damaged: then once more from the beginning
            begin = sum(self._pieces(wanted.digest).values())
            self._require_room(2 * wanted.size - begin)
            if begin < wanted.size:
                self._download(wanted, begin)
            atomic.write(target, self._joined(wanted.digest), like=self._like)
            self._drop_pieces(wanted.digest)
            if self._is_complete(wanted):
                return target
            self.drop(wanted.digest)
        raise TrustError(
            f"a file of the repository is not the one with the digest {wanted.digest[:12]}: "
            "copy the repository again"
        )

    def _download(self, wanted: Wanted, begin: int) -> None:
        buffer = bytearray()
        try:
            with contextlib.closing(wanted.stream(begin)) as chunks:
                for chunk in chunks:
                    buffer += chunk[: wanted.size - begin - len(buffer)]
                    while len(buffer) >= PIECE:
                        begin = self._write(wanted.digest, begin, bytes(buffer[:PIECE]))
                        del buffer[:PIECE]
                    if begin + len(buffer) >= wanted.size:
                        return
        finally:  # what came before a cut is kept
            if buffer:
                self._write(wanted.digest, begin, bytes(buffer))

    def _write(self, digest: str, begin: int, piece: bytes) -> int:
        atomic.write(self.folder / f"{digest}.{begin:012d}", piece, like=self._like)
        return begin + len(piece)

    def _pieces(self, digest: str) -> dict[Path, int]:
        """{piece: bytes}, those that follow each other from the first byte on."""
        found: dict[Path, int] = {}
        while size := disk.size(piece := self.folder / f"{digest}.{sum(found.values()):012d}"):
            found[piece] = size
        return found

    def _joined(self, digest: str) -> Iterator[bytes]:
        for piece in self._pieces(digest):
            yield atomic.read(piece)

    def _is_complete(self, wanted: Wanted) -> bool:
        if disk.size(self.path(wanted.digest)) != wanted.size:
            return False
        return atomic.sha256_of(self.path(wanted.digest))[0] == wanted.digest

    def keep(self, digests: set[str]) -> None:
        """Remove every download but these."""
        if disk.size(self.folder) is None:
            return
        for name in disk.names(self.folder):
            if (digest := name.partition(".")[0]) not in digests or not is_sha256(digest):
                atomic.remove(self.folder / name)

    def drop(self, digest: str) -> None:
        """Remove a download and its pieces."""
        self._drop_pieces(digest)
        if disk.size(self.path(digest)) is not None:
            disk.unlink(self.path(digest))

    def _drop_pieces(self, digest: str) -> None:
        # the last one first: what a cut leaves is still a beginning
        for piece in reversed(self._pieces(digest)):
            disk.unlink(piece)

    def _require_room(self, size: int) -> None:
        found = self.folder
        while not found.exists():
            found = found.parent
        try:
            free = os.statvfs(found)
        except OSError as error:
            raise InputError(f"{found}: {error.strerror or error}") from error
        left = free.f_bavail * free.f_frsize
        if left < size + MARGIN:
            raise ResourceError(
                f"{found} has {left >> 20} MB free, and a download needs "
                f"{(size + MARGIN) >> 20} MB: free disk space"
            )
