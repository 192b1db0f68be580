"""A device's directory, and the commit point of an update.

    bundle/              what the device was flashed with, never changed
    packets/<sha256>     applied packets (of tasks, and of keys), never changed, named by their digest
    generation.0.json    two records, written in turn; each names the packets of one generation, in order, and carries a
    generation.1.json    counter and a checksum. The generation in force is the CONFIRMED record with the highest counter.

A record replaces the older one by rename, so a power cut leaves the old record or the new one, and the record in force is
never the one that is being replaced. Weights are never stored: they are computed from bundle and packets.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..bundle import MANIFEST, Bundle
from ..canonical import dump_json, is_sha256, parse_json, sha256
from ..container import LIMITS, natural
from ..errors import InputError, StorageError, TrustError, UsageError
from ..orders import Recalled, with_recall
from ..packet import Packet

PENDING, CONFIRMED, FAILED = "pending", "confirmed", "failed"
RECORD_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True)
class Generation:
    """One record.

    packets: digests, in order. revision, highest: of the newest packet ever confirmed on this device, in this order.
    trust: packets that changed the keys, in order, each as (digest, n): in force for the n-th of `packets` (from 0) and later.
    recalled: what is never taken again, as (sequence, revision).
    """

    counter: int
    status: str
    packets: tuple[str, ...]
    highest: int
    revision: int = 0
    trust: tuple[tuple[str, int], ...] = ()
    recalled: tuple[Recalled, ...] = ()

    def without(self, count: int) -> Generation:
        """The last `count` packets taken away; keys stay as new as they are."""
        packets = self.packets[: len(self.packets) - count]
        return replace(self, packets=packets, trust=tuple((digest, min(n, len(packets))) for digest, n in self.trust))

    def with_packet(self, digest: str, packet: Packet) -> Generation:
        """One packet more. One of a higher revision recalls all that was built of its tasks before."""
        newest = max((self.revision, self.highest), (packet.revision, packet.sequence))
        recalled = self.recalled
        for sequence, revision in enumerate(packet.revisions, packet.first):
            recalled = with_recall(recalled, Recalled(sequence, revision - 1)) if revision else recalled
        return replace(self, packets=(*self.packets, digest), revision=newest[0], highest=newest[1], recalled=recalled)

    def admits(self, packet: Packet, allow_older: bool) -> None:
        """Raises TrustError for a packet that was recalled, or is not newer than the newest ever confirmed."""
        for sequence, revision in enumerate(packet.revisions, packet.first):
            if any(r.covers(sequence, revision) for r in self.recalled):
                raise TrustError(f"packet {sequence} in revision {revision} was recalled: get a newer revision of it")
        if (packet.revision, packet.sequence) <= (self.revision, self.highest) and not allow_older:
            raise TrustError(
                f"packet {packet.sequence} is not newer than packet {self.highest}, which this device has confirmed and then "
                "rolled back; to take it again on purpose, use --allow-older"
            )

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
        try:
            body["packets"] = tuple(body["packets"])
            body["trust"] = tuple((digest, natural(n, len(body["packets"]))) for digest, n in body.get("trust", ()))
            body["recalled"] = tuple(Recalled(natural(r["sequence"]), natural(r["revision"])) for r in body.get("recalled", ()))
            record = cls(**body)
            for number in (record.counter, record.highest, record.revision):
                natural(number)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"a generation record is malformed: {error!r}") from error
        digests = [*record.packets, *(digest for digest, _ in record.trust)]
        if record.status not in (PENDING, CONFIRMED, FAILED) or not all(map(is_sha256, digests)):
            raise InputError("a generation record is malformed")
        return record


class Store:
    """The files of one store. Raises InputError where `path` is no store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "bundle" / MANIFEST).is_file():
            raise InputError(f"{path} is not a store: make one with sdlora-edge device init BUNDLE --store {path}")

    @classmethod
    def create(cls, path: Path, bundle: Bundle, prove: Callable[[Path], object]) -> Store:
        """A store holding a copy of the bundle, in the bundle's own state; it gets its name once `prove` has looked at it.

        Raises UsageError where `path` exists, and what `prove` raises.
        """
        with files.new_folder(path) as folder:
            (folder / "bundle").mkdir()
            for name in [MANIFEST, *bundle.manifest.files]:
                shutil.copyfile(bundle.path / name, folder / "bundle" / name)
            (folder / "packets").mkdir()
            first = Generation(1, CONFIRMED, (), bundle.manifest.task, bundle.manifest.revision)
            files.write(folder / "generation.1.json", first.to_json())
            prove(folder)
        return cls(path)

    @contextlib.contextmanager
    def lock(self, name: str = "apply.lock", wait: bool = False) -> Iterator[None]:
        """One writer at a time; the operating system frees the lock of a process that dies.

        Raises UsageError where another one writes (unless it is to `wait`), StorageError where the store cannot be written.
        """
        try:
            file = open(self.path / name, "w")  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise UsageError(f"{self.path} is being updated by another process: try again when it is done") from error
            yield

    def current(self) -> Generation:
        """The generation in force. Raises InputError where a record cannot be read, or neither is whole and confirmed."""
        confirmed = [g for g in self._at_one_moment() if g is not None and g.status == CONFIRMED]
        if confirmed:
            return max(confirmed, key=lambda g: g.counter)
        raise InputError(f"{self.path} holds no confirmed generation: flash the device again with device init")

    def _at_one_moment(self) -> list[Generation | None]:
        """Both records: read again until nothing has changed, since a writer may go on twice between one and the other."""
        found = [self._read(0), self._read(1)]
        for _ in range(100):
            before, found = found, [self._read(0), self._read(1)]
            if found == before:
                break
        return found

    def _read(self, slot: int) -> Generation | None:
        """A record, or None where it is missing or damaged; a disk that does not answer is an error, not a missing record."""
        if not self._record(slot).exists():
            return None
        data = files.read(self._record(slot), RECORD_LIMIT)
        try:
            return Generation.from_json(data)
        except (InputError, ValueError):
            return None

    def sweep(self) -> None:
        """Remove what no record names: packets of failed or replaced generations, and files that a cut left half written."""
        records = [g for g in map(self._read, (0, 1)) if g is not None]
        kept = {digest for g in records for digest in (*g.packets, *(key for key, _ in g.trust))}
        with contextlib.suppress(OSError):
            for path in [*(self.path / "packets").iterdir(), *self.path.glob(f"{files.TEMPORARY}*")]:
                if path.name not in kept:
                    path.unlink()

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

    @contextlib.contextmanager
    def replacing(self, new: Generation) -> Iterator[Generation]:
        """The commit point. `new` is the record in force, changed; it gets the next counter. It is pending while the block
        runs, confirmed where it ends without an error, and failed otherwise; in force is the old one until the record says
        confirmed."""
        pending = replace(new, counter=self.current().counter + 1, status=PENDING)
        self._write(pending)
        try:
            yield pending
        except BaseException:
            with contextlib.suppress(StorageError):  # a record that stays pending is not in force either
                self._write(replace(pending, status=FAILED))
            raise
        try:
            self._write(replace(pending, status=CONFIRMED))
        except StorageError:
            if self.current().counter != pending.counter:  # the rename may have been done, and what failed came after it
                raise

    def _write(self, record: Generation) -> None:
        files.write(self._record(record.counter % 2), record.to_json())

    def _record(self, slot: int) -> Path:
        return self.path / f"generation.{slot}.json"

    def _packet(self, digest: str) -> Path:
        return self.path / "packets" / digest

    def size(self) -> dict[str, Any]:
        """Bytes on disk, by part."""
        return {part: sum(p.stat().st_size for p in (self.path / part).iterdir() if p.is_file()) for part in ("bundle", "packets")}
