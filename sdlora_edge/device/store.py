"""A device's directory, and the commit point of an update.

    bundle/              what the device was flashed with, never changed
    packets/<sha256>     applied packets (of tasks, and of keys), never changed, named by their digest
    generation.0.json    the record of the generation in force, twice: it names packets, in order, and carries a counter and
    generation.1.json    a checksum. In force is the CONFIRMED record with the highest counter.
    *.lock               empty files, held while something is written; who only reads takes none

Modes do not depend on the umask: folders are 0700, files 0600. A group to share with (`create`) may read, and no more: folders
are then 2750, files 0640. Locks are 0600 always. What is added later is as readable as the folder it lies in.

A record is replaced by rename, so a power cut leaves the old one or the new one. While a new generation is made, one of the
two is its PENDING record, which holds a copy of the one in force; the commit is the rename that makes it CONFIRMED, and then
the other one becomes its copy. So either may be damaged at any time, and nothing is forgotten. Weights are never stored: they
are computed from bundle and packets.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UNWRITTEN, InputError, LimitError, UsageError
from ..formats.bundle import MANIFEST, Bundle
from ..formats.canonical import dump_json, is_sha256, parse_json, sha256
from ..formats.container import LIMITS, natural
from ..formats.control import Revoked, with_revocation
from ..formats.packet import Packet
from ..storage import atomic, disk

log = logging.getLogger(__name__)

PENDING, CONFIRMED, FAILED = "pending", "confirmed", "failed"
_RECORDS = ("generation.0.json", "generation.1.json")
RECORD_LIMIT = 4 * 1024 * 1024
"""bytes: 30,000 packets"""
COUNTER_LIMIT = 2**53
MEMORY = "watch.json"
"""what a watcher remembers, written under a lock of its own"""


@dataclass(frozen=True)
class Generation:
    """One record.

    packets: digests, in order. revision, highest: of the newest packet ever confirmed on this device, in this order.
    trust: packets that changed the keys, in order, each as (digest, n): in force for the n-th of `packets` (from 0) and later.
    revoked: what is never taken again, as (sequence, revision). bundle: the id of the bundle the store was made with.
    before: in a record that is not confirmed, the one that was in force when it was written.
    """

    counter: int
    status: str
    packets: tuple[str, ...]
    highest: int
    revision: int = 0
    trust: tuple[tuple[str, int], ...] = ()
    revoked: tuple[Revoked, ...] = ()
    bundle: str = ""
    before: Generation | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """Every packet that this record needs, of tasks and of keys."""
        return (*self.packets, *(digest for digest, _ in self.trust))

    def confirmed(self) -> Generation:
        """The same, in force."""
        return replace(self, status=CONFIRMED, before=None)

    def without(self, count: int) -> Generation:
        """The last `count` packets taken away; keys stay as new as they are."""
        packets = self.packets[: len(self.packets) - count]
        return replace(
            self,
            packets=packets,
            trust=tuple((digest, min(n, len(packets))) for digest, n in self.trust),
        )

    def with_packet(self, digest: str, packet: Packet) -> Generation:
        """One packet more. One of a higher revision revocations all that was built of its tasks before."""
        newest = max((self.revision, self.highest), (packet.revision, packet.sequence))
        revoked = self.revoked
        for sequence, revision in packet.versions:
            revoked = (
                with_revocation(revoked, Revoked(sequence, revision - 1)) if revision else revoked
            )
        return replace(
            self,
            packets=(*self.packets, digest),
            revision=newest[0],
            highest=newest[1],
            revoked=revoked,
        )

    def to_json(self) -> bytes:
        body = asdict(self)
        return dump_json({**body, "checksum": sha256(dump_json(body))})

    @classmethod
    def from_json(cls, data: bytes) -> Generation:
        """Raises InputError unless these are exactly the bytes that `to_json` makes, its checksum among them."""
        body = parse_json(data, "a generation record")
        body.pop("checksum", None)
        record = cls._from_body(body)
        if record.to_json() != data:
            raise InputError("a generation record's checksum does not fit")
        return record

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Generation:
        try:
            before = None if body["before"] is None else cls._from_body(body["before"])
            packets = tuple(body["packets"])
            trust = tuple((digest, natural(n, len(packets))) for digest, n in body["trust"])
            revoked = tuple(
                Revoked(
                    natural(r["sequence"], LIMITS.sequence), natural(r["revision"], LIMITS.revision)
                )
                for r in body["revoked"]
            )
            natural(len(revoked), LIMITS.revocations)
            record = cls(
                **{**body, "packets": packets, "trust": trust, "revoked": revoked, "before": before}
            )
            natural(record.counter, COUNTER_LIMIT)
            natural(record.highest, LIMITS.sequence)
            natural(record.revision, LIMITS.revision)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"a generation record is malformed: {error!r}") from error
        if record.status not in (PENDING, CONFIRMED, FAILED) or not all(
            map(is_sha256, record.digests)
        ):
            raise InputError("a generation record is malformed")
        if (record.before is None) != (record.status == CONFIRMED):
            raise InputError(
                "a generation record that is not confirmed must hold the one before it"
            )
        return record


class Store:
    """The files of one store. Raises InputError where `path` is no store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace = path / "engine"
        """the engine's own folder"""
        with atomic.reading(path):
            found = disk.size(path / "bundle" / MANIFEST)
        if found is None:
            raise InputError(
                f"{path} is not a store: make one with sdlora-edge device init --bundle BUNDLE --store {path}"
            )
        atomic.refuse_links(path, path / "bundle", path / "packets")

    @classmethod
    def create(
        cls, path: Path, bundle: Bundle, prove: Callable[[Path], object], group: str | None = None
    ) -> Store:
        """A store holding a copy of the bundle, in the bundle's own state; it gets its name once `prove` has looked at it.

        group: a name or number; its members may read the store. Raises UsageError if `path` exists or the group does not, and
        what `prove` raises.
        """
        shared = None if group is None else _group(group)
        with atomic.new_folder(path, 0o700) as folder:
            if shared is not None:
                _share(folder, shared)
            disk.mkdir(folder / "bundle", like=folder)
            for name in [MANIFEST, *bundle.manifest.files]:
                atomic.copy(bundle.path / name, folder / "bundle" / name)
            disk.sync(folder / "bundle")
            disk.mkdir(folder / "packets", like=folder)
            first = Generation(
                1, CONFIRMED, (), bundle.manifest.task, bundle.manifest.revision, bundle=bundle.id
            )
            for slot in (0, 1):  # both, so that either may be damaged
                _write_record(folder / _RECORDS[slot], first)
            prove(folder)
        return cls(path)

    @contextlib.contextmanager
    def lock(self, name: str = "apply.lock", wait: float = 0.0) -> Iterator[None]:
        """One writer at a time; the operating system frees the lock of a process that dies.

        wait: seconds. Raises UsageError if another one still writes then, StorageError if the store cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(disk.lock(self.path / name, wait))
                # what a killed process has renamed, and not synced, is built upon: let it stay
                atomic.keep_name(self.path)
                disk.sync(self.path / "packets")
                disk.sync(self.path)
            except BlockingIOError as error:
                raise UsageError(
                    f"{self.path} is being updated by another process: try again when it is done"
                ) from error
            except OSError as error:
                raise atomic.unwritten(self.path, error) from error
            yield

    def current(self) -> Generation:
        """The generation in force. Raises InputError where a record cannot be read, or neither is whole."""
        whole = [g for g in self.records().values() if g is not None]
        if confirmed := [g for g in whole if g.status == CONFIRMED]:
            return max(confirmed, key=lambda g: g.counter)
        for (
            record
        ) in whole:  # what is in force is damaged, and was about to be followed by this one
            if record.before is not None:
                return record.before
        raise InputError(
            f"{self.path} holds no generation record that is whole: flash the device again with device init"
        )

    def records(self) -> dict[Path, Generation | None]:
        """Both records; None for one that is missing or damaged. A disk that does not answer is an error: raises InputError."""
        found = {self.path / name: _read_record(self.path / name) for name in _RECORDS}
        for _ in range(
            100
        ):  # both at one moment: a writer may go on twice between one and the other
            before, found = found, {path: _read_record(path) for path in found}
            if found == before:
                break
        return found

    def named(self) -> list[Generation]:
        """Every generation that a whole record holds."""
        whole = [record for record in self.records().values() if record is not None]
        return whole + [record.before for record in whole if record.before is not None]

    def damage(self) -> list[str]:
        """A line for each record that is missing or damaged: the other one is in force, and the next update repairs it."""
        return [
            f"{path} is missing or damaged: the other record is used"
            for path, record in self.records().items()
            if record is None
        ]

    def leftovers(self) -> list[Path]:
        """What no record names: packets of failed or replaced generations, and what a cut left half written. Raises InputError."""
        kept = {digest for record in self.named() for digest in record.digests}
        with atomic.reading(self.path):
            packets = [
                self._packet(name) for name in disk.names(self.path / "packets") if name not in kept
            ]
            cut = [name for name in disk.names(self.path) if name.startswith(atomic.TEMPORARY)]
            # a watcher may be writing its memory just now; what is left of that, its next write removes
            return packets + [self.path / name for name in cut if name != atomic.TEMPORARY + MEMORY]

    def sweep(self) -> None:
        """Remove the leftovers. One that cannot be removed does no harm and stays."""
        for path in self.leftovers():
            with contextlib.suppress(OSError):
                atomic.remove(path)

    def add_packet(self, data: bytes) -> str:
        """Keep a verified packet under its digest, and read it back."""
        digest = sha256(data)
        atomic.write(self._packet(digest), data, like=self.path)
        self.packet(digest)
        return digest

    def packet(self, digest: str) -> bytes:
        """Raises InputError where its bytes are no longer those of its name."""
        path = self._packet(digest)
        with contextlib.suppress(InputError):
            if sha256(data := atomic.read(path, LIMITS.packet)) == digest:
                return data
        data = atomic.read(path, LIMITS.packet)  # once more: a disk may fail for a moment
        if sha256(data) != digest:
            raise InputError(f"{path} is damaged: apply this packet again")
        return data

    def damaged(self, digests: Iterable[str]) -> tuple[str, ...]:
        """Those of these packets whose files are damaged."""
        found = []
        for digest in digests:
            try:
                self.packet(digest)
            except InputError:
                found.append(digest)
        return tuple(found)

    @contextlib.contextmanager
    def replacing(self, new: Generation) -> Iterator[Generation]:
        """The commit point. `new` is the record in force, changed; it gets the next counter. It is pending while the block
        runs, confirmed where it ends without an error, and failed otherwise; in force is the old one until the record says
        confirmed."""
        old = self.current()
        pending = replace(new, counter=old.counter + 1, status=PENDING, before=old)
        path = self._spare()
        _write_record(path, pending)
        try:
            yield pending
        except BaseException:
            with contextlib.suppress(
                *UNWRITTEN
            ):  # a record that stays pending is not in force either
                _write_record(path, replace(pending, status=FAILED))
            raise
        try:
            _write_record(path, pending.confirmed())
        except UNWRITTEN as error:
            if self.current().counter != pending.counter:
                raise
            # the rename has been done, and what failed came after it: every process sees the new generation
            log.warning(
                "%s: in force, but a power cut may bring back the generation before it", error
            )
        try:
            _write_record(self._other(path), pending.confirmed())
        except UNWRITTEN as error:
            log.warning(
                "%s: in force, but a damaged record would bring back the generation before it",
                error,
            )

    def _spare(self) -> Path:
        """The record to write next: a damaged one, else one that is not confirmed, else the older one, if they differ."""
        records = self.records()
        return min(
            records,
            key=lambda path: (
                (0,) if (r := records[path]) is None else (1, r.status == CONFIRMED, r.counter)
            ),
        )

    def _other(self, record: Path) -> Path:
        return next(path for name in _RECORDS if (path := self.path / name) != record)

    def _packet(self, digest: str) -> Path:
        return self.path / "packets" / digest

    def size(self) -> dict[str, Any]:
        """Bytes on disk, by part."""
        found = {}
        for part in ("bundle", "packets"):
            folder = self.path / part
            with atomic.reading(folder):
                found[part] = sum(disk.size(folder / name) or 0 for name in disk.names(folder))
        return found


def store_around(path: Path) -> Path | None:
    """The store that a path is, or leads into, links followed; None if there is none."""
    real = Path(os.path.realpath(path))
    return next(
        (
            folder
            for folder in (real, *real.parents)
            if any(os.path.isfile(folder / name) for name in _RECORDS)
        ),
        None,
    )


def _group(name: str) -> int:
    """Its number. Raises UsageError."""
    try:
        number = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
        raise UsageError(f"there is no group {name!r}: make it, or name another one") from error
    if number >= 2**32 - 1:  # the largest means "as it is" to the operating system
        raise UsageError(f"there is no group {name!r}: a group's number is below {2**32 - 1}")
    return number


def _share(folder: Path, group: int) -> None:
    try:
        disk.share(folder, group)
    except PermissionError as error:
        raise UsageError(
            f"this user may not share files with group {group}: join that group, or run this as root"
        ) from error


def _write_record(path: Path, record: Generation) -> None:
    """Raises StorageError, ResourceError; LimitError for one that no reader would take."""
    if len(data := record.to_json()) > RECORD_LIMIT:
        raise LimitError(
            f"a generation record of {len(data)} bytes is beyond {RECORD_LIMIT}: flash this device with a newer bundle"
        )
    atomic.write(path, data, like=path.parent)


def _read_record(path: Path) -> Generation | None:
    with atomic.reading(path):
        missing = disk.size(path) is None
    if missing:
        return None
    try:
        data = atomic.read(path, RECORD_LIMIT)
    except LimitError:  # nobody wrote it: it is damaged
        return None
    try:
        return Generation.from_json(data)
    except (InputError, ValueError):
        return None
