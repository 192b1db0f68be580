"""A device's directory, and the commit point of an update.

    bundle/              what the device was flashed with, never changed
    packets/<sha256>     applied packets, never changed, named by their digest
    generation.0.json    two records, written in turn; each names the packets of one generation, in order, and carries a
    generation.1.json    counter and a checksum. The generation in force is the CONFIRMED record with the highest counter.

A record replaces the older one by rename, so a power cut leaves the old record or the new one, and the record in force is
never the one that is being replaced. Weights are never stored: they are computed from bundle and packets.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..bundle import MANIFEST, Bundle, open_bundle
from ..canonical import dump_json, parse_json, sha256
from ..errors import InputError, UsageError
from ..packet import LIMITS

PENDING, CONFIRMED, FAILED = "pending", "confirmed", "failed"
RECORD_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True)
class Generation:
    """One record. packets: digests, in order. highest: the highest sequence number ever confirmed on this device."""

    counter: int
    status: str
    packets: tuple[str, ...]
    highest: int

    def to_json(self) -> bytes:
        body = asdict(self)
        return dump_json({**body, "checksum": sha256(dump_json(body))})

    @classmethod
    def from_json(cls, data: bytes) -> Generation:
        """Raises InputError unless the checksum fits."""
        body = parse_json(data, "a generation record")
        checksum = body.pop("checksum", None)
        if checksum != sha256(dump_json(body)):
            raise InputError("a generation record's checksum does not fit")
        return cls(**{**body, "packets": tuple(body["packets"])})


class Store:
    """The files of one store. Raises InputError where `path` is no store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "bundle" / MANIFEST).is_file():
            raise InputError(f"{path} is not a store: make one with sdlora-edge device init BUNDLE --store {path}")

    @classmethod
    def create(cls, path: Path, bundle: Bundle) -> Store:
        """A store holding a copy of the bundle, in the bundle's own state. Raises UsageError where `path` exists."""
        with files.new_folder(path) as folder:
            (folder / "bundle").mkdir()
            for name in [MANIFEST, *bundle.manifest.files]:
                shutil.copyfile(bundle.path / name, folder / "bundle" / name)
            open_bundle(folder / "bundle")
            (folder / "packets").mkdir()
            first = Generation(1, CONFIRMED, (), bundle.manifest.task)
            files.write(folder / "generation.1.json", first.to_json())
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time; the operating system frees the lock of a process that dies. Raises UsageError."""
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"{self.path} is being updated by another process: try again when it is done") from error
            yield

    def current(self) -> Generation:
        """The generation in force. Raises InputError where neither record is whole and confirmed."""
        found = []
        for slot in (0, 1):
            try:
                found.append(Generation.from_json(files.read(self._record(slot), RECORD_LIMIT)))
            except (InputError, KeyError, TypeError):
                continue
        confirmed = [g for g in found if g.status == CONFIRMED]
        if not confirmed:
            raise InputError(f"{self.path} holds no confirmed generation: flash the device again with device init")
        return max(confirmed, key=lambda g: g.counter)

    def add_packet(self, data: bytes) -> str:
        """Keep a verified packet under its digest, and read it back."""
        digest = sha256(data)
        files.write(self._packet(digest), data)
        self.packet(digest)
        return digest

    def packet(self, digest: str) -> bytes:
        """Raises InputError where its bytes are no longer those of its name."""
        path = self._packet(digest)
        data = files.read(path, LIMITS.packet)
        if sha256(data) != digest:
            raise InputError(f"{path} is damaged: roll back, or flash the device again")
        return data

    @contextmanager
    def replacing(self, packets: tuple[str, ...], sequence: int) -> Iterator[Generation]:
        """The commit point. The new generation is pending while the block runs, confirmed where it ends without an error,
        and failed otherwise; in force is the old one until the record says confirmed."""
        old = self.current()
        pending = Generation(old.counter + 1, PENDING, packets, old.highest)
        self._write(pending)
        try:
            yield pending
        except BaseException:
            self._write(replace(pending, status=FAILED))
            raise
        self._write(replace(pending, status=CONFIRMED, highest=max(old.highest, sequence)))

    def _write(self, record: Generation) -> None:
        files.write(self._record(record.counter % 2), record.to_json())

    def _record(self, slot: int) -> Path:
        return self.path / f"generation.{slot}.json"

    def _packet(self, digest: str) -> Path:
        return self.path / "packets" / digest

    def size(self) -> dict[str, Any]:
        """Bytes on disk, by part."""
        return {part: sum(p.stat().st_size for p in (self.path / part).iterdir() if p.is_file()) for part in ("bundle", "packets")}
